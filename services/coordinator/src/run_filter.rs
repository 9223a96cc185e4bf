//! The `filter` and `order_by` of ListRuns: a part of AIP-160 and of AIP-132, read, printed and evaluated.
//!
//! Both come from outside, so reading is bounded: never a panic, and an error says where it is and what would do there.
//! As in AIP-160, OR binds tighter than AND.
//!
//! ```text
//! filter     = [ expression ]
//! expression = factor { "AND" factor }
//! factor     = term { "OR" term }
//! term       = [ "NOT" | "-" ] ( comparison | "(" expression ")" )
//! comparison = field ( "=" | "!=" | "<" | "<=" | ">" | ">=" | ":" ) value
//! ```
//!
//! `:` on a text asks whether it holds the value somewhere, `:*` whether it is not empty.

use std::cmp::Ordering;
use std::fmt;
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use wire::pb::RunState;

/// Longest filter or order, in bytes.
pub(crate) const MAX_BYTES: usize = 4096;
/// Deepest parentheses.
pub(crate) const MAX_NESTING: usize = 32;

const STATE_PREFIX: &str = "RUN_STATE_";
const FIELDS: &str = "one of `id`, `state`, `display_name`, `model` and `create_time`";
const ORDER_FIELDS: &str = "one of `state`, `display_name`, `create_time` and `end_time`";
const OPERATOR: &str = "one of = != < <= > >= :";
const TIME_OPERATOR: &str = "one of = != < <= > >=, as this field is a time";
const STATE_OPERATOR: &str = "= or !=, as states have no order";
const VALUE: &str = "a value, in quotes unless it is of letters, digits and _ - . / : + * @ alone";
const TIME: &str = "an RFC 3339 time, such as \"2026-01-01T00:00:00Z\"";
const STATE: &str = "a state, such as RUNNING or SUCCEEDED";

/// What of a run filters and orders look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunFields<'a> {
    pub(crate) id: &'a str,
    pub(crate) state: RunState,
    pub(crate) display_name: &'a str,
    pub(crate) model: &'a str,
    pub(crate) create_time: SystemTime,
    pub(crate) end_time: Option<SystemTime>,
}

/// Which runs to list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Filter(Option<Expression>);

impl Filter {
    /// Reads a filter; an empty one matches every run.
    ///
    /// # Errors
    /// At the first place where it cannot go on.
    pub(crate) fn parse(text: &str) -> Result<Self, FilterError> {
        let mut reader = Reader::new(text)?;
        if reader.at_end() {
            return Ok(Self(None));
        }
        let expression = reader.expression(0)?;
        if reader.at_end() { Ok(Self(Some(expression))) } else { Err(reader.error("AND, OR or the end")) }
    }

    pub(crate) fn matches(&self, run: &RunFields<'_>) -> bool {
        self.0.as_ref().is_none_or(|expression| expression.matches(run))
    }
}

/// The order of a list of runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order(Vec<OrderKey>);

impl Order {
    /// Reads an order; an empty one means newest first.
    ///
    /// # Errors
    /// At the first place where it cannot go on.
    pub(crate) fn parse(text: &str) -> Result<Self, FilterError> {
        let mut reader = Reader::new(text)?;
        let mut keys: Vec<OrderKey> = Vec::new();
        if reader.at_end() {
            return Ok(Self(keys));
        }
        loop {
            reader.skip_space();
            let start = reader.at;
            let field = OrderField::named(reader.word());
            let is_new = |field: &OrderField| keys.iter().all(|key| key.field != *field);
            let Some(field) = field.filter(is_new) else {
                reader.at = start;
                return Err(reader.error(if field.is_some() {
                    "a field not named before"
                } else {
                    ORDER_FIELDS
                }));
            };
            let falling = reader.keyword("desc");
            keys.push(OrderKey { field, falling });
            if reader.at_end() {
                return Ok(Self(keys));
            }
            if !reader.symbol(",") {
                return Err(reader.error(if falling {
                    "a comma or the end"
                } else {
                    "`desc`, a comma or the end"
                }));
            }
        }
    }

    /// A total order: what the fields leave open, creation decides, newest first, and then the identifier.
    pub(crate) fn compare(&self, one: &RunFields<'_>, other: &RunFields<'_>) -> Ordering {
        let by_keys = self.0.iter().map(|key| key.compare(one, other)).find(|ordering| ordering.is_ne());
        by_keys.unwrap_or_else(|| other.create_time.cmp(&one.create_time).then_with(|| one.id.cmp(other.id)))
    }
}

/// Why a filter or an order cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("character {position}: found {found}, expected {expected}")]
pub(crate) struct FilterError {
    /// Counts characters from 1.
    pub(crate) position: usize,
    /// What is there instead, cut short.
    pub(crate) found: String,
    pub(crate) expected: &'static str,
}

#[derive(Debug, Clone, PartialEq)]
enum Expression {
    All(Vec<Expression>),
    Any(Vec<Expression>),
    Not(Box<Expression>),
    Is(Comparison),
}

impl Expression {
    fn matches(&self, run: &RunFields<'_>) -> bool {
        match self {
            Self::All(parts) => parts.iter().all(|part| part.matches(run)),
            Self::Any(parts) => parts.iter().any(|part| part.matches(run)),
            Self::Not(part) => !part.matches(run),
            Self::Is(comparison) => comparison.matches(run),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Comparison {
    Text { field: TextField, relation: Relation, value: String },
    Contains { field: TextField, part: String },
    Present { field: TextField },
    State { is: RunState },
    OtherState { than: RunState },
    Created { relation: Relation, time: OffsetDateTime },
}

impl Comparison {
    fn matches(&self, run: &RunFields<'_>) -> bool {
        match self {
            Self::Text { field, relation, value } => relation.holds(field.of(run).cmp(value)),
            Self::Contains { field, part } => field.of(run).contains(part.as_str()),
            Self::Present { field } => !field.of(run).is_empty(),
            Self::State { is } => run.state == *is,
            Self::OtherState { than } => run.state != *than,
            Self::Created { relation, time } => relation.holds(run.create_time.cmp(&SystemTime::from(*time))),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TextField {
    Id,
    DisplayName,
    Model,
}

impl TextField {
    fn name(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::DisplayName => "display_name",
            Self::Model => "model",
        }
    }

    fn of<'a>(self, run: &RunFields<'a>) -> &'a str {
        match self {
            Self::Id => run.id,
            Self::DisplayName => run.display_name,
            Self::Model => run.model,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Relation {
    /// Those that begin with another come before it.
    const ALL: [Self; 6] =
        [Self::NotEqual, Self::LessOrEqual, Self::GreaterOrEqual, Self::Equal, Self::Less, Self::Greater];

    fn symbol(self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        }
    }

    fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct OrderKey {
    field: OrderField,
    falling: bool,
}

impl OrderKey {
    fn compare(self, one: &RunFields<'_>, other: &RunFields<'_>) -> Ordering {
        let rising = match self.field {
            OrderField::State => one.state.as_str_name().cmp(other.state.as_str_name()),
            OrderField::DisplayName => one.display_name.cmp(other.display_name),
            OrderField::CreateTime => one.create_time.cmp(&other.create_time),
            // A run that has not ended will end later than those that have.
            OrderField::EndTime => {
                let key = |run: &RunFields<'_>| (run.end_time.is_none(), run.end_time);
                key(one).cmp(&key(other))
            }
        };
        if self.falling { rising.reverse() } else { rising }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OrderField {
    State,
    DisplayName,
    CreateTime,
    EndTime,
}

impl OrderField {
    const ALL: [Self; 4] = [Self::State, Self::DisplayName, Self::CreateTime, Self::EndTime];

    fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::DisplayName => "display_name",
            Self::CreateTime => "create_time",
            Self::EndTime => "end_time",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|field| field.name() == name)
    }
}

/// Reads from left to right, without going back further than to the start of a word.
struct Reader<'a> {
    text: &'a str,
    /// In bytes, always between characters.
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Result<Self, FilterError> {
        if text.len() > MAX_BYTES {
            let found = format!("{} bytes", text.len());
            return Err(FilterError { position: 1, found, expected: "at most 4096 bytes" });
        }
        Ok(Self { text, at: 0 })
    }

    fn expression(&mut self, nesting: usize) -> Result<Expression, FilterError> {
        let mut parts = vec![self.factor(nesting)?];
        while self.keyword("AND") {
            parts.push(self.factor(nesting)?);
        }
        Ok(joined(parts, Expression::All))
    }

    fn factor(&mut self, nesting: usize) -> Result<Expression, FilterError> {
        let mut parts = vec![self.term(nesting)?];
        while self.keyword("OR") {
            parts.push(self.term(nesting)?);
        }
        Ok(joined(parts, Expression::Any))
    }

    fn term(&mut self, nesting: usize) -> Result<Expression, FilterError> {
        if self.symbol("-") || self.keyword("NOT") {
            return Ok(Expression::Not(Box::new(self.simple(nesting)?)));
        }
        self.simple(nesting)
    }

    fn simple(&mut self, nesting: usize) -> Result<Expression, FilterError> {
        let start = self.at;
        if !self.symbol("(") {
            return self.comparison().map(Expression::Is);
        }
        if nesting == MAX_NESTING {
            self.at = start;
            return Err(self.error("at most 32 parentheses around each other"));
        }
        let inner = self.expression(nesting + 1)?;
        if self.symbol(")") { Ok(inner) } else { Err(self.error("AND, OR or `)`")) }
    }

    fn comparison(&mut self) -> Result<Comparison, FilterError> {
        self.skip_space();
        let start = self.at;
        match self.word() {
            "id" => self.text_comparison(TextField::Id),
            "display_name" => self.text_comparison(TextField::DisplayName),
            "model" => self.text_comparison(TextField::Model),
            "state" => self.state_comparison(),
            "create_time" => {
                let relation = self.relation().ok_or_else(|| self.error(TIME_OPERATOR))?;
                let read = |text: &str| OffsetDateTime::parse(text, &Rfc3339).ok();
                Ok(Comparison::Created { relation, time: self.value_as(TIME, read)? })
            }
            _ => {
                self.at = start;
                Err(self.error(FIELDS))
            }
        }
    }

    fn text_comparison(&mut self, field: TextField) -> Result<Comparison, FilterError> {
        if let Some(relation) = self.relation() {
            let value = self.value_as(VALUE, |text| Some(text.to_owned()))?;
            return Ok(Comparison::Text { field, relation, value });
        }
        if !self.symbol(":") {
            return Err(self.error(OPERATOR));
        }
        self.skip_space();
        let is_quoted = self.rest().starts_with(['"', '\'']);
        let part = self.value_as(VALUE, |text| Some(text.to_owned()))?;
        let is_present = part == "*" && !is_quoted;
        Ok(if is_present { Comparison::Present { field } } else { Comparison::Contains { field, part } })
    }

    fn state_comparison(&mut self) -> Result<Comparison, FilterError> {
        let start = self.at;
        let is = match self.relation() {
            Some(Relation::Equal) => true,
            Some(Relation::NotEqual) => false,
            None if self.symbol(":") => true,
            Some(Relation::Less | Relation::LessOrEqual | Relation::Greater | Relation::GreaterOrEqual)
            | None => {
                self.at = start;
                return Err(self.error(STATE_OPERATOR));
            }
        };
        let state = self.value_as(STATE, state_named)?;
        Ok(if is { Comparison::State { is: state } } else { Comparison::OtherState { than: state } })
    }

    fn relation(&mut self) -> Option<Relation> {
        Relation::ALL.into_iter().find(|relation| self.symbol(relation.symbol()))
    }

    /// A quoted or bare value, turned into what it stands for.
    fn value_as<T>(
        &mut self,
        expected: &'static str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T, FilterError> {
        self.skip_space();
        let start = self.at;
        let value = match self.rest().chars().next() {
            Some(quote @ ('"' | '\'')) => read(&self.quoted(quote)?),
            _ => match self.bare() {
                "" | "AND" | "OR" | "NOT" => None,
                word => read(word),
            },
        };
        value.ok_or_else(|| {
            self.at = start;
            self.error(expected)
        })
    }

    /// A backslash takes the next character as it is.
    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        let mut value = String::new();
        let mut letters = self.rest().char_indices().skip(1);
        while let Some((offset, letter)) = letters.next() {
            match letter {
                '\\' => value.extend(letters.next().map(|(_, escaped)| escaped)),
                _ if letter == quote => {
                    self.at += offset + letter.len_utf8();
                    return Ok(value);
                }
                _ => value.push(letter),
            }
        }
        self.at = self.text.len();
        Err(self.error(if quote == '"' { "a closing \"" } else { "a closing '" }))
    }

    fn bare(&mut self) -> &'a str {
        self.take_while(|letter| letter.is_alphanumeric() || "_-./:+*@".contains(letter))
    }

    fn word(&mut self) -> &'a str {
        self.take_while(|letter| letter.is_alphanumeric() || letter == '_')
    }

    /// Whether `keyword` comes next as a whole word, which is then read.
    fn keyword(&mut self, keyword: &str) -> bool {
        self.skip_space();
        let start = self.at;
        let is_next = self.word() == keyword;
        if !is_next {
            self.at = start;
        }
        is_next
    }

    /// Whether `symbol` comes next, which is then read.
    fn symbol(&mut self, symbol: &str) -> bool {
        self.skip_space();
        let is_next = self.rest().starts_with(symbol);
        if is_next {
            self.at += symbol.len();
        }
        is_next
    }

    fn at_end(&mut self) -> bool {
        self.skip_space();
        self.rest().is_empty()
    }

    fn skip_space(&mut self) {
        self.take_while(char::is_whitespace);
    }

    fn take_while(&mut self, is_wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|letter| !is_wanted(letter)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error(&mut self, expected: &'static str) -> FilterError {
        const SHOWN: usize = 24;
        self.skip_space();
        let position = self.text[..self.at].chars().count() + 1;
        let shown: String = self.rest().chars().take(SHOWN).collect();
        let cut = if shown.len() < self.rest().len() { "…" } else { "" };
        let found = if shown.is_empty() { "the end".to_owned() } else { format!("`{shown}{cut}`") };
        FilterError { position, found, expected }
    }
}

fn joined(mut parts: Vec<Expression>, join: fn(Vec<Expression>) -> Expression) -> Expression {
    match parts.pop() {
        Some(only) if parts.is_empty() => only,
        last => {
            parts.extend(last);
            join(parts)
        }
    }
}

/// With or without the prefix that the schema gives all states.
fn state_named(name: &str) -> Option<RunState> {
    let short = name.strip_prefix(STATE_PREFIX).unwrap_or(name);
    RunState::from_str_name(&format!("{STATE_PREFIX}{short}")).filter(|state| *state != RunState::Unspecified)
}

/// Prints what [`Filter::parse`] reads as the same filter.
impl fmt::Display for Filter {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |expression| expression.fmt(out))
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (parts, between) = match self {
            Self::All(parts) => (parts.as_slice(), " AND "),
            Self::Any(parts) => (parts.as_slice(), " OR "),
            Self::Not(part) => {
                out.write_str("NOT ")?;
                (std::slice::from_ref(&**part), "")
            }
            Self::Is(comparison) => return comparison.fmt(out),
        };
        for (index, part) in parts.iter().enumerate() {
            if index > 0 {
                out.write_str(between)?;
            }
            let is_tighter = matches!(
                (self, part),
                (_, Self::Is(_)) | (Self::All(_), Self::Any(_)) | (Self::All(_) | Self::Any(_), Self::Not(_))
            );
            if is_tighter { part.fmt(out)? } else { write!(out, "({part})")? }
        }
        Ok(())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text { field, relation, value } => {
                write!(out, "{} {} {}", field.name(), relation.symbol(), Quoted(value))
            }
            Self::Contains { field, part } => write!(out, "{}:{}", field.name(), Quoted(part)),
            Self::Present { field } => write!(out, "{}:*", field.name()),
            Self::State { is } => write!(out, "state = {}", short_name(*is)),
            Self::OtherState { than } => write!(out, "state != {}", short_name(*than)),
            Self::Created { relation, time } => {
                let time = time.format(&Rfc3339).map_err(|_| fmt::Error)?;
                write!(out, "create_time {} \"{time}\"", relation.symbol())
            }
        }
    }
}

fn short_name(state: RunState) -> &'static str {
    let name = state.as_str_name();
    name.strip_prefix(STATE_PREFIX).unwrap_or(name)
}

struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "\"{}\"", self.0.replace('\\', "\\\\").replace('"', "\\\""))
    }
}

#[cfg(test)]
#[path = "run_filter_tests.rs"]
mod tests;

//! Filter and order of ListRuns: comparisons in the language of AIP-160, orders in that of AIP-132.

use pruning_run::RunState;
use std::cmp::Ordering;
use std::fmt;
use std::time::SystemTime;

/// Longest filter, in bytes, and deepest nesting.
const MOST_BYTES: usize = 2048;
const MOST_DEPTH: usize = 32;

/// What of a run can be compared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunFields<'a> {
    pub(crate) id: &'a str,
    pub(crate) state: RunState,
    pub(crate) display_name: &'a str,
    pub(crate) model: &'a str,
    pub(crate) create_time: SystemTime,
    pub(crate) end_time: Option<SystemTime>,
    /// Place in the order of creation.
    pub(crate) number: u64,
}

/// Why a filter or an order cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {position}: {problem}")]
pub(crate) struct FilterError {
    position: usize,
    problem: String,
}

/// A condition on runs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Filter {
    /// Every run.
    All,
    And(Vec<Filter>),
    Or(Vec<Filter>),
    Not(Box<Filter>),
    Compare(Comparison),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Comparison {
    Text { field: TextField, operator: Operator, value: String },
    State { operator: Operator, value: RunState },
    Time { field: TimeField, operator: Operator, value: SystemTime },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextField {
    Id,
    DisplayName,
    Model,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeField {
    Create,
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operator {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    /// The text contains the value.
    Has,
}

impl Filter {
    /// # Errors
    /// Names the place and what was expected there.
    pub(crate) fn parse(text: &str) -> Result<Self, FilterError> {
        if text.len() > MOST_BYTES {
            let problem = format!("the filter has {} bytes, at most {MOST_BYTES} are read", text.len());
            return Err(FilterError { position: MOST_BYTES, problem });
        }
        let tokens = tokens(text)?;
        if tokens.is_empty() {
            return Ok(Self::All);
        }
        let mut parser = Parser { tokens: &tokens, place: 0, end: text.len(), depth: 0 };
        let filter = parser.conjunction()?;
        match parser.peek() {
            None => Ok(filter),
            Some(_) => Err(parser.expected("AND, OR or the end")),
        }
    }

    pub(crate) fn matches(&self, run: &RunFields<'_>) -> bool {
        match self {
            Self::All => true,
            Self::And(all) => all.iter().all(|filter| filter.matches(run)),
            Self::Or(any) => any.iter().any(|filter| filter.matches(run)),
            Self::Not(filter) => !filter.matches(run),
            Self::Compare(comparison) => comparison.holds(run),
        }
    }
}

impl Comparison {
    fn holds(&self, run: &RunFields<'_>) -> bool {
        match self {
            Self::Text { field, operator, value } => {
                let text = match field {
                    TextField::Id => run.id,
                    TextField::DisplayName => run.display_name,
                    TextField::Model => run.model,
                };
                match operator {
                    Operator::Has => text.to_lowercase().contains(&value.to_lowercase()),
                    Operator::Equal
                    | Operator::NotEqual
                    | Operator::Less
                    | Operator::LessEqual
                    | Operator::Greater
                    | Operator::GreaterEqual => operator.holds(text.cmp(value.as_str())),
                }
            }
            Self::State { operator, value } => match operator {
                Operator::NotEqual => run.state != *value,
                Operator::Equal
                | Operator::Has
                | Operator::Less
                | Operator::LessEqual
                | Operator::Greater
                | Operator::GreaterEqual => run.state == *value,
            },
            Self::Time { field, operator, value } => match field {
                TimeField::Create => operator.holds(run.create_time.cmp(value)),
                // A run that has not ended is neither before nor after any time.
                TimeField::End => run.end_time.is_some_and(|time| operator.holds(time.cmp(value))),
            },
        }
    }
}

impl Operator {
    fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal | Self::Has => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterEqual => ordering.is_ge(),
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessEqual => "<=",
            Self::Greater => ">",
            Self::GreaterEqual => ">=",
            Self::Has => ":",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Quoted(String),
    Operator(Operator),
    Open,
    Close,
    Minus,
}

/// Tokens with their places.
fn tokens(text: &str) -> Result<Vec<(usize, Token)>, FilterError> {
    let mut found = Vec::new();
    let mut rest = text.char_indices().peekable();
    while let Some(&(position, symbol)) = rest.peek() {
        let token = match symbol {
            _ if symbol.is_whitespace() => {
                rest.next();
                continue;
            }
            '(' | ')' | '=' | ':' | '-' => {
                rest.next();
                match symbol {
                    '(' => Token::Open,
                    ')' => Token::Close,
                    '=' => Token::Operator(Operator::Equal),
                    ':' => Token::Operator(Operator::Has),
                    _ => Token::Minus,
                }
            }
            '!' | '<' | '>' => {
                rest.next();
                let equal = rest.next_if(|(_, next)| *next == '=').is_some();
                Token::Operator(match (symbol, equal) {
                    ('!', true) => Operator::NotEqual,
                    ('!', false) => {
                        return Err(FilterError { position, problem: "`!` must be `!=`".to_owned() });
                    }
                    ('<', true) => Operator::LessEqual,
                    ('<', false) => Operator::Less,
                    (_, true) => Operator::GreaterEqual,
                    (_, false) => Operator::Greater,
                })
            }
            '"' | '\'' => {
                rest.next();
                let mut value = String::new();
                loop {
                    match rest.next() {
                        None => {
                            return Err(FilterError {
                                position,
                                problem: "the quotes are not closed".to_owned(),
                            });
                        }
                        Some((_, '\\')) => value.extend(rest.next().map(|(_, escaped)| escaped)),
                        Some((_, closing)) if closing == symbol => break,
                        Some((_, inner)) => value.push(inner),
                    }
                }
                Token::Quoted(value)
            }
            _ => {
                let mut word = String::new();
                while let Some((_, next)) = rest.next_if(|(_, next)| {
                    next.is_alphanumeric() || matches!(next, '_' | '.' | '-' | '/' | '*' | '+')
                }) {
                    word.push(next);
                }
                if word.is_empty() {
                    return Err(FilterError { position, problem: format!("`{symbol}` is not expected") });
                }
                Token::Word(word)
            }
        };
        found.push((position, token));
    }
    Ok(found)
}

struct Parser<'a> {
    tokens: &'a [(usize, Token)],
    place: usize,
    end: usize,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.place).map(|(_, token)| token)
    }

    fn expected(&self, what: &str) -> FilterError {
        let position = self.tokens.get(self.place).map_or(self.end, |(position, _)| *position);
        FilterError { position, problem: format!("expected {what}") }
    }

    fn take_word(&mut self, word: &str) -> bool {
        let is_it = matches!(self.peek(), Some(Token::Word(found)) if found == word);
        self.place += usize::from(is_it);
        is_it
    }

    /// Factors joined by AND, or by nothing, which means the same. OR binds tighter, as AIP-160 has it.
    fn conjunction(&mut self) -> Result<Filter, FilterError> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err(self.expected(&format!("no more than {MOST_DEPTH} parentheses within each other")));
        }
        let mut all = vec![self.disjunction()?];
        while self.take_word("AND") || !matches!(self.peek(), None | Some(Token::Close)) {
            all.push(self.disjunction()?);
        }
        self.depth -= 1;
        Ok(only_or(all, Filter::And))
    }

    fn disjunction(&mut self) -> Result<Filter, FilterError> {
        let mut any = vec![self.term()?];
        while self.take_word("OR") {
            any.push(self.term()?);
        }
        Ok(only_or(any, Filter::Or))
    }

    fn term(&mut self) -> Result<Filter, FilterError> {
        let minus = matches!(self.peek(), Some(Token::Minus));
        self.place += usize::from(minus);
        if minus || self.take_word("NOT") {
            return Ok(Filter::Not(Box::new(self.simple()?)));
        }
        self.simple()
    }

    fn simple(&mut self) -> Result<Filter, FilterError> {
        if let Some(Token::Open) = self.peek() {
            self.place += 1;
            let inner = self.conjunction()?;
            if !matches!(self.peek(), Some(Token::Close)) {
                return Err(self.expected("`)`"));
            }
            self.place += 1;
            return Ok(inner);
        }
        self.comparison().map(Filter::Compare)
    }

    fn comparison(&mut self) -> Result<Comparison, FilterError> {
        const FIELDS: &str = "a field: state, display_name, model, create_time, end_time or id";
        let Some(Token::Word(field)) = self.peek() else { return Err(self.expected(FIELDS)) };
        let field = field.clone();
        let known = ["state", "display_name", "model", "create_time", "end_time", "id"];
        if !known.contains(&field.as_str()) {
            return Err(self.expected(FIELDS));
        }
        self.place += 1;
        let Some(Token::Operator(operator)) = self.peek() else {
            return Err(self.expected("=, !=, <, <=, >, >= or :"));
        };
        let operator = *operator;
        if field == "state" && !matches!(operator, Operator::Equal | Operator::NotEqual | Operator::Has) {
            return Err(self.expected("= or != after state"));
        }
        self.place += 1;
        let (Some(Token::Word(value)) | Some(Token::Quoted(value))) = self.peek() else {
            return Err(self.expected("a value; put it in quotes if it has odd characters"));
        };
        let value = value.clone();
        let comparison = match field.as_str() {
            "state" => match state_of(&value) {
                Some(value) => Comparison::State { operator, value },
                None => return Err(self.expected("the name of a state, such as RUNNING")),
            },
            "create_time" | "end_time" => match humantime::parse_rfc3339_weak(&value) {
                Ok(value) => {
                    let field = if field == "end_time" { TimeField::End } else { TimeField::Create };
                    Comparison::Time { field, operator, value }
                }
                Err(_) => return Err(self.expected("a time such as \"2026-01-31T12:00:00Z\"")),
            },
            "display_name" => Comparison::Text { field: TextField::DisplayName, operator, value },
            "model" => Comparison::Text { field: TextField::Model, operator, value },
            _ => Comparison::Text { field: TextField::Id, operator, value },
        };
        self.place += 1;
        Ok(comparison)
    }
}

fn only_or(mut filters: Vec<Filter>, join: fn(Vec<Filter>) -> Filter) -> Filter {
    match (filters.len(), filters.pop()) {
        (1, Some(only)) => only,
        (_, Some(last)) => {
            filters.push(last);
            join(filters)
        }
        (_, None) => Filter::All,
    }
}

/// States by the names of the messages, with or without their prefix.
fn state_of(name: &str) -> Option<RunState> {
    let name = name.strip_prefix("RUN_STATE_").unwrap_or(name);
    STATES.iter().find(|(_, known)| *known == name).map(|(state, _)| *state)
}

fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Queued => "QUEUED",
        RunState::Starting => "STARTING",
        RunState::Running => "RUNNING",
        RunState::Exporting => "EXPORTING",
        RunState::Succeeded => "SUCCEEDED",
        RunState::Failed => "FAILED",
        RunState::Cancelled => "CANCELLED",
        RunState::Pausing => "PAUSING",
        RunState::Paused => "PAUSED",
        RunState::Recovering => "RECOVERING",
        RunState::Cancelling => "CANCELLING",
    }
}

const STATES: [(RunState, &str); 11] = [
    (RunState::Queued, "QUEUED"),
    (RunState::Starting, "STARTING"),
    (RunState::Running, "RUNNING"),
    (RunState::Exporting, "EXPORTING"),
    (RunState::Succeeded, "SUCCEEDED"),
    (RunState::Failed, "FAILED"),
    (RunState::Cancelled, "CANCELLED"),
    (RunState::Pausing, "PAUSING"),
    (RunState::Paused, "PAUSED"),
    (RunState::Recovering, "RECOVERING"),
    (RunState::Cancelling, "CANCELLING"),
];

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>, filters: &[Self], word: &str| {
            for (place, filter) in filters.iter().enumerate() {
                write!(f, "{}({filter})", if place == 0 { String::new() } else { format!(" {word} ") })?;
            }
            Ok(())
        };
        match self {
            Self::All => Ok(()),
            Self::And(all) => joined(f, all, "AND"),
            Self::Or(any) => joined(f, any, "OR"),
            Self::Not(filter) => write!(f, "NOT ({filter})"),
            Self::Compare(Comparison::Text { field, operator, value }) => {
                let field = match field {
                    TextField::Id => "id",
                    TextField::DisplayName => "display_name",
                    TextField::Model => "model",
                };
                let value = value.replace('\\', "\\\\").replace('"', "\\\"");
                write!(f, "{field} {} \"{value}\"", operator.sign())
            }
            Self::Compare(Comparison::State { operator, value }) => {
                write!(f, "state {} {}", operator.sign(), state_name(*value))
            }
            Self::Compare(Comparison::Time { field, operator, value }) => {
                let field = if *field == TimeField::End { "end_time" } else { "create_time" };
                write!(f, "{field} {} \"{}\"", operator.sign(), humantime::format_rfc3339_nanos(*value))
            }
        }
    }
}

/// Fields to order by, each rising or falling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Order(Vec<(OrderField, bool)>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OrderField {
    State,
    DisplayName,
    CreateTime,
    EndTime,
}

impl Order {
    /// # Errors
    /// Names the place and what was expected there.
    pub(crate) fn parse(text: &str) -> Result<Self, FilterError> {
        let mut fields = Vec::new();
        let mut position = 0;
        for part in text.split(',').filter(|_| !text.trim().is_empty()) {
            let mut words = part.split_whitespace();
            let wrong = |problem: &str| FilterError { position, problem: problem.to_owned() };
            let field = match words.next() {
                Some("state") => OrderField::State,
                Some("display_name") => OrderField::DisplayName,
                Some("create_time") => OrderField::CreateTime,
                Some("end_time") => OrderField::EndTime,
                Some(_) | None => {
                    return Err(wrong("expected state, display_name, create_time or end_time"));
                }
            };
            let falls = match (words.next(), words.next()) {
                (None, None) | (Some("asc"), None) => false,
                (Some("desc"), None) => true,
                (_, _) => return Err(wrong("expected `desc`, a comma or the end after the field")),
            };
            fields.push((field, falls));
            position += part.len() + 1;
        }
        Ok(Self(fields))
    }

    /// Runs that are equal in all fields go newest first.
    pub(crate) fn compare(&self, one: &RunFields<'_>, other: &RunFields<'_>) -> Ordering {
        let by = |(field, falls): &(OrderField, bool)| {
            let ordering = match field {
                OrderField::State => state_name(one.state).cmp(state_name(other.state)),
                OrderField::DisplayName => one.display_name.cmp(other.display_name),
                OrderField::CreateTime => one.create_time.cmp(&other.create_time),
                OrderField::EndTime => one.end_time.cmp(&other.end_time),
            };
            if *falls { ordering.reverse() } else { ordering }
        };
        let first = self.0.iter().map(by).find(|ordering| ordering.is_ne());
        first.unwrap_or_else(|| other.number.cmp(&one.number))
    }
}

#[cfg(test)]
#[path = "run_filter_tests.rs"]
mod tests;

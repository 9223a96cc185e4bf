//! The page of the API, docs/api.md: everything that the schema says, comments included.

use prost_reflect::{Cardinality, DescriptorPool, FieldDescriptor, FileDescriptor, Kind, MethodDescriptor};
use std::fmt::Write as _;
use wire::status::Reason;

/// Where the page is, from the root.
pub const PAGE: &str = "docs/api.md";
/// Writes the page anew.
pub const COMMAND: &str = "cargo run -p tidy-tests --bin api_page";

const PACKAGE: &str = "espalier.v1";

/// The text of the page.
///
/// # Panics
/// When the schema does not decode: a fault of the build.
#[must_use]
pub fn page() -> String {
    let schema = DescriptorPool::decode(wire::pb::DESCRIPTORS).expect("the schema decodes");
    let files: Vec<FileDescriptor> = schema.files().filter(|file| file.package_name() == PACKAGE).collect();
    let mut page = format!(
        "# API\n\nWhat `proto/espalier/v1` says, written by `{COMMAND}`; change it there.\n\
         Package `{PACKAGE}`.\n"
    );
    page.push_str("\n## Services\n");
    for service in files.iter().flat_map(FileDescriptor::services) {
        let place = Place { file: &service.parent_file(), path: service.path() };
        write_paragraphs(&mut page, &format!("### {}", service.name()), &place.comment());
        for method in service.methods() {
            let place = Place { file: &service.parent_file(), path: method.path() };
            write_paragraphs(&mut page, &signature(&method), &place.comment());
        }
    }
    page.push_str("\n## Messages\n");
    for file in &files {
        for message in file.messages() {
            let place = Place { file, path: message.path() };
            write_paragraphs(&mut page, &format!("### {}", message.name()), &place.comment());
            if message.fields().len() > 0 {
                page.push_str("\n| field | type | |\n| --- | --- | --- |\n");
            }
            // In the order of the file, not of the numbers.
            let mut fields: Vec<FieldDescriptor> = message.fields().collect();
            fields.sort_by(|one, other| one.path().cmp(other.path()));
            for field in fields {
                let comment = Place { file, path: field.path() }.comment();
                let (name, kind) = (field.name(), field_type(&field));
                writeln!(page, "| `{name}` | {kind} | {} |", cell(&comment)).expect("a string takes all");
            }
        }
        for enumeration in file.enums() {
            let place = Place { file, path: enumeration.path() };
            write_paragraphs(&mut page, &format!("### {}", enumeration.name()), &place.comment());
            page.push_str("\n| member | number | |\n| --- | --- | --- |\n");
            for member in enumeration.values() {
                let comment = Place { file, path: member.path() }.comment();
                let (name, number) = (member.name(), member.number());
                writeln!(page, "| `{name}` | {number} | {} |", cell(&comment)).expect("a string takes all");
            }
        }
    }
    page.push_str(
        "\n## Statuses\n\nA call that fails carries `google.rpc.ErrorInfo` with one of these reasons, and its fields at \
         fault in `google.rpc.BadRequest`.\n\n| reason | code |\n| --- | --- |\n",
    );
    for reason in Reason::ALL {
        let code = screaming(&format!("{:?}", reason.code()));
        writeln!(page, "| `{}` | `{code}` |", reason.name()).expect("a string takes all");
    }
    page
}

/// Something that the schema declares and comments on.
struct Place<'a> {
    file: &'a FileDescriptor,
    path: &'a [i32],
}

impl Place<'_> {
    /// The lines above it, without the blank that begins each.
    fn comment(&self) -> String {
        let locations =
            self.file.file_descriptor_proto().source_code_info.iter().flat_map(|info| &info.location);
        let comment = locations
            .filter(|location| location.path == self.path)
            .find_map(|location| location.leading_comments.as_deref());
        let lines =
            comment.unwrap_or_default().lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end());
        lines.collect::<Vec<_>>().join("\n").trim().to_owned()
    }
}

fn write_paragraphs(page: &mut String, first: &str, rest: &str) {
    writeln!(page, "\n{first}\n\n{rest}").expect("a string takes all");
}

fn signature(method: &MethodDescriptor) -> String {
    let side = |is_stream: bool, name: &str| {
        format!("{}[{name}](#{})", if is_stream { "stream of " } else { "" }, name.to_lowercase())
    };
    format!(
        "**`{}`**: {} → {}",
        method.name(),
        side(method.is_client_streaming(), method.input().name()),
        side(method.is_server_streaming(), method.output().name())
    )
}

fn field_type(field: &FieldDescriptor) -> String {
    if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
        let [key, value] = [entry.map_entry_key_field(), entry.map_entry_value_field()];
        return format!("map from {} to {}", kind_name(&key.kind()), kind_name(&value.kind()));
    }
    let kind = kind_name(&field.kind());
    match (field.cardinality(), field.containing_oneof()) {
        (Cardinality::Repeated, _) => format!("list of {kind}"),
        (_, Some(one)) if !one.is_synthetic() => format!("{kind}, one of `{}`", one.name()),
        (_, Some(_)) => format!("{kind}, optional"),
        (Cardinality::Optional | Cardinality::Required, None) => kind,
    }
}

fn kind_name(kind: &Kind) -> String {
    let linked = |package: &str, name: &str, full: &str| {
        if package == PACKAGE { format!("[{name}](#{})", name.to_lowercase()) } else { format!("`{full}`") }
    };
    match kind {
        Kind::Message(message) => linked(message.package_name(), message.name(), message.full_name()),
        Kind::Enum(member) => linked(member.package_name(), member.name(), member.full_name()),
        Kind::Double
        | Kind::Float
        | Kind::Int32
        | Kind::Int64
        | Kind::Uint32
        | Kind::Uint64
        | Kind::Sint32
        | Kind::Sint64
        | Kind::Fixed32
        | Kind::Fixed64
        | Kind::Sfixed32
        | Kind::Sfixed64
        | Kind::Bool
        | Kind::String
        | Kind::Bytes => format!("`{kind:?}`"),
    }
}

/// One line for a table.
fn cell(comment: &str) -> String {
    let paragraphs = comment.split("\n\n").map(|paragraph| paragraph.replace('\n', " "));
    paragraphs.collect::<Vec<_>>().join("<br>").replace('|', "\\|")
}

/// `NotFound` as `NOT_FOUND`.
fn screaming(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(letter.to_uppercase());
    }
    text
}

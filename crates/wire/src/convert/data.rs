//! `TextSource`, `EvaluationSpec` and `TaskSpec`.

use super::{below, bounded_list, bounded_text, count_field, enum_field, required_text};
use crate::fields::Violations;
use crate::{EvaluationMode, EvaluationSpec, TaskSpec, TextFormat, TextSource, limits, pb};

const DEFAULT_WINDOW_TOKENS: usize = 256;
const DEFAULT_ROWS: usize = 8;
const DEFAULT_PASS_TOKENS: usize = 512;

/// Files of text; what is wrong goes to `found`.
pub fn sources_from_pb(messages: Vec<pb::TextSource>, path: &str, found: &mut Violations) -> Vec<TextSource> {
    if !bounded_list(messages.len(), path, found) {
        return Vec::new();
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(place, message)| source_from_pb(message, &format!("{path}[{place}]"), found))
        .collect()
}

fn source_from_pb(message: pb::TextSource, path: &str, found: &mut Violations) -> TextSource {
    required_text(&message.path, &below(path, "path"), "a file below one of the workers' roots", found);
    bounded_text(&message.field, &below(path, "field"), found);
    let format = match pb::TextFormat::try_from(message.format) {
        Ok(pb::TextFormat::Unspecified) => None,
        Ok(pb::TextFormat::Plain) => Some(TextFormat::Plain),
        Ok(pb::TextFormat::JsonLines) => Some(TextFormat::JsonLines),
        Ok(pb::TextFormat::Parquet) => Some(TextFormat::Parquet),
        Ok(pb::TextFormat::TokensJsonLines) => Some(TextFormat::TokensJsonLines),
        Ok(pb::TextFormat::TokensU16) => Some(TextFormat::TokensU16),
        Ok(pb::TextFormat::TokensU32) => Some(TextFormat::TokensU32),
        Err(_) => {
            found.reject(
                below(path, "format"),
                format!("has no member {}; leave it out to go by the file's extension", message.format),
            );
            None
        }
    };
    let field = (!message.field.is_empty()).then_some(message.field);
    TextSource { path: message.path, format, field }
}

/// What to measure perplexity on; what is wrong goes to `found`.
pub fn evaluation_from_pb(message: pb::EvaluationSpec, path: &str, found: &mut Violations) -> EvaluationSpec {
    let at = |field: &str| below(path, field);
    if message.sources.is_empty() {
        found.reject(at("sources"), "must name at least one file");
    }
    let mut window = |tokens: u32, field: String| {
        let most = limits::MAX_WINDOW_TOKENS;
        if !(2..=most).contains(&tokens) {
            found.reject(field, format!("must lie in 2..={most}; got {tokens}"));
        }
        tokens as usize
    };
    let mut windows = vec![
        message.window_tokens.map_or(DEFAULT_WINDOW_TOKENS, |tokens| window(tokens, at("window_tokens"))),
    ];
    for (place, tokens) in message.more_window_tokens.iter().take(limits::MAX_ENTRIES).enumerate() {
        windows.push(window(*tokens, format!("{}[{place}]", at("more_window_tokens"))));
    }
    bounded_list(message.more_window_tokens.len(), &at("more_window_tokens"), found);
    EvaluationSpec {
        sources: sources_from_pb(message.sources, &at("sources"), found),
        windows,
        max_tokens: (message.max_tokens > 0).then_some(message.max_tokens),
        mode: enum_field(
            message.mode,
            EvaluationMode::Stream,
            |member| match member {
                pb::EvaluationMode::Unspecified => None,
                pb::EvaluationMode::Stream => Some(EvaluationMode::Stream),
                pb::EvaluationMode::Stories => Some(EvaluationMode::Stories),
            },
            &at("mode"),
            "EVALUATION_MODE_STREAM or EVALUATION_MODE_STORIES",
            found,
        ),
        rows: count_field(message.rows, DEFAULT_ROWS, limits::MAX_ROWS, &at("rows"), found),
    }
}

/// Tasks to measure; what is wrong goes to `found`.
pub fn tasks_from_pb(message: pb::TaskSpec, path: &str, found: &mut Violations) -> TaskSpec {
    let at = |field: &str| below(path, field);
    if message.files.is_empty() {
        found.reject(at("files"), "must name at least one file");
    }
    bounded_list(message.files.len(), &at("files"), found);
    let files: Vec<String> = message.files.into_iter().take(limits::MAX_ENTRIES).collect();
    for (place, file) in files.iter().enumerate() {
        let field = format!("{}[{place}]", at("files"));
        required_text(file, &field, "a task file below one of the workers' roots", found);
    }
    TaskSpec {
        files,
        max_rows: (message.max_rows > 0).then_some(message.max_rows),
        pass_tokens: count_field(
            message.pass_tokens,
            DEFAULT_PASS_TOKENS,
            limits::MAX_WINDOW_TOKENS,
            &at("pass_tokens"),
            found,
        ),
        log_likelihoods: message.log_likelihoods,
    }
}

#[must_use]
pub fn sources_to_pb(sources: &[TextSource]) -> Vec<pb::TextSource> {
    sources
        .iter()
        .map(|source| pb::TextSource {
            path: source.path.clone(),
            format: match source.format {
                None => pb::TextFormat::Unspecified,
                Some(TextFormat::Plain) => pb::TextFormat::Plain,
                Some(TextFormat::JsonLines) => pb::TextFormat::JsonLines,
                Some(TextFormat::Parquet) => pb::TextFormat::Parquet,
                Some(TextFormat::TokensJsonLines) => pb::TextFormat::TokensJsonLines,
                Some(TextFormat::TokensU16) => pb::TextFormat::TokensU16,
                Some(TextFormat::TokensU32) => pb::TextFormat::TokensU32,
            }
            .into(),
            field: source.field.clone().unwrap_or_default(),
        })
        .collect()
}

#[must_use]
pub fn evaluation_to_pb(spec: &EvaluationSpec) -> pb::EvaluationSpec {
    let mode = match spec.mode {
        EvaluationMode::Stream => pb::EvaluationMode::Stream,
        EvaluationMode::Stories => pb::EvaluationMode::Stories,
    };
    let mut windows = spec.windows.iter().map(|tokens| u32::try_from(*tokens).unwrap_or(u32::MAX));
    pb::EvaluationSpec {
        sources: sources_to_pb(&spec.sources),
        window_tokens: windows.next(),
        more_window_tokens: windows.collect(),
        max_tokens: spec.max_tokens.unwrap_or(0),
        mode: Some(mode.into()),
        rows: Some(u32::try_from(spec.rows).unwrap_or(u32::MAX)),
    }
}

#[must_use]
pub fn tasks_to_pb(spec: &TaskSpec) -> pb::TaskSpec {
    pb::TaskSpec {
        files: spec.files.clone(),
        max_rows: spec.max_rows.unwrap_or(0),
        pass_tokens: Some(u32::try_from(spec.pass_tokens).unwrap_or(u32::MAX)),
        log_likelihoods: spec.log_likelihoods,
    }
}

//! `TextSource` and `EvaluationSpec`.

use super::{below, bounded_list, bounded_text, count_field, enum_field, required_text};
use crate::fields::Violations;
use crate::{EvaluationMode, EvaluationSpec, TextFormat, TextSource, limits, pb};

const DEFAULT_WINDOW_TOKENS: usize = 256;
const DEFAULT_ROWS: usize = 8;

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
    let window_tokens = match message.window_tokens {
        None => DEFAULT_WINDOW_TOKENS,
        Some(tokens) if (2..=limits::MAX_WINDOW_TOKENS).contains(&tokens) => tokens as usize,
        Some(tokens) => {
            let most = limits::MAX_WINDOW_TOKENS;
            found.reject(at("window_tokens"), format!("must lie in 2..={most}; got {tokens}"));
            DEFAULT_WINDOW_TOKENS
        }
    };
    EvaluationSpec {
        sources: sources_from_pb(message.sources, &at("sources"), found),
        window_tokens,
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
    pb::EvaluationSpec {
        sources: sources_to_pb(&spec.sources),
        window_tokens: Some(u32::try_from(spec.window_tokens).unwrap_or(u32::MAX)),
        max_tokens: spec.max_tokens.unwrap_or(0),
        mode: Some(mode.into()),
        rows: Some(u32::try_from(spec.rows).unwrap_or(u32::MAX)),
    }
}

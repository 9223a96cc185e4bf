//! The tokenizer inside a GGUF file, as the files that `transformers` and `tokenizers` read.
//!
//! Two kinds: byte-level BPE with its merges ("gpt2"), and SentencePiece BPE ("llama"), whose merges follow from the
//! scores of its pieces: joining two pieces to a third has the rank of the third.

use super::header::Header;
use super::values::Value;
use serde_json::{Map, Value as Json, json};
use std::collections::HashMap;
use tokenizers::Tokenizer;

/// Longer than any piece of a trained vocabulary; bounds the work of finding a piece's halves.
const MAX_PIECE_CHARS: usize = 256;
/// SentencePiece's sign for a blank.
const BLANK: &str = "\u{2581}";
/// How Llama 3 cuts text into words before merging.
const LLAMA3_WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Why the tokenizer of a GGUF file cannot be carried over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    #[error("`{key}` is missing, so there is no tokenizer to carry over; give a file with one")]
    Missing { key: &'static str },
    #[error("`{key}` is {actual}, expected {expected}; fetch the file again")]
    WrongValue { key: &'static str, actual: String, expected: String },
    #[error("`{key}` is {actual}, supported are {supported}; give the model in Hugging Face layout instead")]
    Unsupported { key: &'static str, actual: String, supported: &'static str },
    #[error("token {index} of `{key}` is not UTF-8; fetch the file again")]
    NotUtf8 { key: &'static str, index: usize },
    #[error("tokens {first} and {second} are both {token:?}; fetch the file again")]
    DuplicateToken { token: String, first: usize, second: usize },
    #[error("merge {index} is {merge:?}, expected two tokens with a blank between; fetch the file again")]
    Merge { index: usize, merge: String },
    #[error(
        "token {index} has {chars} characters, at most {MAX_PIECE_CHARS} are possible; fetch the file again"
    )]
    LongPiece { index: usize, chars: usize },
    #[error("its parts make no tokenizer: {reason}")]
    Build { reason: String },
}

/// The tokenizer's files and the two ids that the model's own files repeat.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: String,
    pub(super) tokenizer_config: Map<String, Json>,
    pub(super) special_tokens_map: Map<String, Json>,
    pub(super) bos_token_id: Option<usize>,
    pub(super) eos_token_id: Option<usize>,
}

/// Kinds of tokens, numbered as in SentencePiece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    ids: HashMap<&'a str, usize>,
    kinds: Vec<TokenKind>,
}

pub(super) fn read_tokenizer(
    header: &Header<'_>,
    vocab_size: usize,
) -> Result<TokenizerFiles, TokenizerError> {
    let keys = Keys { header };
    let kind =
        keys.text("tokenizer.ggml.model")?.ok_or(TokenizerError::Missing { key: "tokenizer.ggml.model" })?;
    let vocabulary = vocabulary(&keys, vocab_size)?;
    let bos = keys.token_id("tokenizer.ggml.bos_token_id", &vocabulary)?;
    let eos = keys.token_id("tokenizer.ggml.eos_token_id", &vocabulary)?;
    let unknown = keys.token_id("tokenizer.ggml.unknown_token_id", &vocabulary)?;
    let padding = keys.token_id("tokenizer.ggml.padding_token_id", &vocabulary)?;
    let parts = match kind {
        "gpt2" => byte_level(&keys, &vocabulary)?,
        "llama" => sentence_piece(&keys, &vocabulary, unknown.unwrap_or(0))?,
        other => {
            return Err(TokenizerError::Unsupported {
                key: "tokenizer.ggml.model",
                actual: format!("{other:?}"),
                supported: "\"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE)",
            });
        }
    };
    let add_bos = keys.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.adds_bos_by_default);
    let add_eos = keys.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let token = |id: Option<usize>| id.and_then(|id| vocabulary.tokens.get(id)).copied();
    let before = token(bos.filter(|_| add_bos)).zip(bos);
    let after = token(eos.filter(|_| add_eos)).zip(eos);
    let document = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(&vocabulary),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": template(before, after),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    let special = |(name, id): (&str, _)| token(id).map(|token| (name.to_owned(), Json::from(token)));
    let special_tokens_map: Map<String, Json> =
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", padding)]
            .into_iter()
            .filter_map(special)
            .collect();
    let mut config = special_tokens_map.clone();
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    config.insert("add_prefix_space".to_owned(), json!(parts.adds_prefix_space));
    config.insert("add_bos_token".to_owned(), json!(add_bos));
    if add_eos {
        config.insert("add_eos_token".to_owned(), json!(true));
    }
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(length) = keys.header.metadata.get("llama.context_length").and_then(|value| value.as_u64()) {
        config.insert("model_max_length".to_owned(), json!(length));
    }
    if let Some(chat_template) = keys.text("tokenizer.chat_template")? {
        config.insert("chat_template".to_owned(), json!(chat_template));
    }
    Ok(TokenizerFiles {
        tokenizer: build(&document)?,
        tokenizer_config: config,
        special_tokens_map,
        bos_token_id: bos,
        eos_token_id: eos,
    })
}

/// Lets the library read the tokenizer and write it in its own order, so that what is written is known to load.
fn build(document: &Json) -> Result<String, TokenizerError> {
    let failed = |error: tokenizers::Error| TokenizerError::Build { reason: error.to_string() };
    let tokenizer = Tokenizer::from_bytes(document.to_string()).map_err(failed)?;
    tokenizer.to_string(true).map_err(failed)
}

struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    adds_bos_by_default: bool,
    adds_prefix_space: bool,
}

fn byte_level(keys: &Keys<'_>, vocabulary: &Vocabulary<'_>) -> Result<Parts, TokenizerError> {
    let key = "tokenizer.ggml.merges";
    let mut merges = Vec::new();
    for (index, merge) in keys.texts(key)?.ok_or(TokenizerError::Missing { key })?.into_iter().enumerate() {
        let pair = merge.split_once(' ').filter(|(_, right)| !right.contains(' '));
        merges.push(pair.ok_or_else(|| TokenizerError::Merge { index, merge: merge.to_owned() })?);
    }
    let words = |use_regex| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let sequence = |first| json!({ "type": "Sequence", "pretokenizers": first });
    let single_digits = json!({ "type": "Digits", "individual_digits": true });
    let (pre_tokenizer, is_llama3) = match keys.text("tokenizer.ggml.pre")?.unwrap_or("default") {
        "default" | "gpt-2" => (words(true), false),
        "smollm" => (sequence(json!([single_digits, words(true)])), false),
        "llama-bpe" | "llama3" | "llama-v3" => {
            let split = json!({
                "type": "Split", "pattern": { "Regex": LLAMA3_WORDS }, "behavior": "Isolated", "invert": false,
            });
            (sequence(json!([split, words(false)])), true)
        }
        other => {
            return Err(TokenizerError::Unsupported {
                key: "tokenizer.ggml.pre",
                actual: format!("{other:?}"),
                supported: "\"default\", \"gpt-2\", \"smollm\" and \"llama-bpe\"",
            });
        }
    };
    Ok(Parts {
        normalizer: Json::Null,
        pre_tokenizer,
        decoder: json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        }),
        // Llama 3 takes a word that is a token whole, even where its merges would not lead there.
        model: bpe(vocabulary, json!(merges), &Json::Null, false, is_llama3),
        adds_bos_by_default: is_llama3,
        adds_prefix_space: false,
    })
}

fn sentence_piece(
    keys: &Keys<'_>,
    vocabulary: &Vocabulary<'_>,
    unknown: usize,
) -> Result<Parts, TokenizerError> {
    let key = "tokenizer.ggml.scores";
    let value = keys.header.metadata.get(key).ok_or(TokenizerError::Missing { key })?;
    let count = vocabulary.tokens.len();
    let scores = value.as_numbers().filter(|scores| scores.len() == count).ok_or_else(|| {
        TokenizerError::WrongValue { key, actual: value.describe(), expected: format!("{count} numbers") }
    })?;
    let prefixed = keys.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace =
        |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = Vec::new();
    if prefixed {
        normalizers.push(json!({ "type": "Prepend", "prepend": BLANK }));
    }
    normalizers.push(replace(" ", BLANK));
    let mut decoders =
        vec![replace(BLANK, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if prefixed {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let merges = json!(merges_from_scores(vocabulary, &scores)?);
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Json::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: bpe(vocabulary, merges, &json!(vocabulary.tokens.get(unknown)), true, false),
        adds_bos_by_default: true,
        adds_prefix_space: prefixed,
    })
}

/// Every way to cut a piece into two pieces, best score first; equal ones by the ids of the halves.
fn merges_from_scores<'a>(
    vocabulary: &Vocabulary<'a>,
    scores: &[f64],
) -> Result<Vec<(&'a str, &'a str)>, TokenizerError> {
    let mut merges = Vec::new();
    for (index, (&piece, kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        if *kind != TokenKind::Normal {
            continue;
        }
        let chars = piece.chars().count();
        if chars > MAX_PIECE_CHARS {
            return Err(TokenizerError::LongPiece { index, chars });
        }
        let mut halves: Vec<_> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(middle, _)| {
                let (left, right) = piece.split_at(middle);
                Some((vocabulary.ids.get(left)?, vocabulary.ids.get(right)?, left, right))
            })
            .collect();
        halves.sort_unstable();
        let score = scores.get(index).copied().unwrap_or(0.0);
        merges.extend(halves.into_iter().map(|(_, _, left, right)| (score, left, right)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(merges.into_iter().map(|(_, left, right)| (left, right)).collect())
}

fn bpe(
    vocabulary: &Vocabulary<'_>,
    merges: Json,
    unknown: &Json,
    byte_fallback: bool,
    ignore_merges: bool,
) -> Json {
    let vocab: Map<String, Json> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": unknown,
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    })
}

/// Tokens that are never merged from text: control tokens, and those a user defined.
fn added_tokens(vocabulary: &Vocabulary<'_>) -> Vec<Json> {
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate();
    tokens
        .filter_map(|(id, (content, kind))| {
            let special = match kind {
                TokenKind::Control | TokenKind::Unknown => true,
                TokenKind::UserDefined => false,
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
            };
            Some(json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            }))
        })
        .collect()
}

/// Puts the begin and end tokens around a text, and around each of a pair.
fn template(before: Option<(&str, usize)>, after: Option<(&str, usize)>) -> Json {
    if before.is_none() && after.is_none() {
        return Json::Null;
    }
    let around = |name: &str, type_id: u32| {
        let special =
            |(token, _): (&str, usize)| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        before.map(special).into_iter().chain([text]).chain(after.map(special)).collect::<Vec<_>>()
    };
    let special_tokens: Map<String, Json> = before
        .into_iter()
        .chain(after)
        .map(|(token, id)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": special_tokens,
    })
}

fn vocabulary<'a>(keys: &Keys<'a>, vocab_size: usize) -> Result<Vocabulary<'a>, TokenizerError> {
    let key = "tokenizer.ggml.tokens";
    let tokens = keys.texts(key)?.ok_or(TokenizerError::Missing { key })?;
    if tokens.len() != vocab_size {
        return Err(TokenizerError::WrongValue {
            key,
            actual: format!("an array of {} strings", tokens.len()),
            expected: format!("{vocab_size} strings, the rows of `token_embd.weight`"),
        });
    }
    let mut ids = HashMap::with_capacity(tokens.len());
    for (second, &token) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(token, second) {
            return Err(TokenizerError::DuplicateToken { token: token.to_owned(), first, second });
        }
    }
    let key = "tokenizer.ggml.token_type";
    let kinds = match keys.header.metadata.get(key) {
        None => vec![TokenKind::Normal; tokens.len()],
        Some(value) => {
            let kinds = value.as_integers().and_then(|numbers| {
                let kinds: Option<Vec<_>> = numbers.into_iter().map(token_kind).collect();
                kinds.filter(|kinds| kinds.len() == tokens.len())
            });
            let expected = || format!("{} numbers from 1 to 6", tokens.len());
            kinds.ok_or_else(|| TokenizerError::WrongValue {
                key,
                actual: value.describe(),
                expected: expected(),
            })?
        }
    };
    Ok(Vocabulary { tokens, ids, kinds })
}

fn token_kind(number: i128) -> Option<TokenKind> {
    match number {
        1 => Some(TokenKind::Normal),
        2 => Some(TokenKind::Unknown),
        3 => Some(TokenKind::Control),
        4 => Some(TokenKind::UserDefined),
        5 => Some(TokenKind::Unused),
        6 => Some(TokenKind::Byte),
        _ => None,
    }
}

/// Typed access to the tokenizer's metadata.
struct Keys<'a> {
    header: &'a Header<'a>,
}

impl<'a> Keys<'a> {
    fn typed<T>(
        &self,
        key: &'static str,
        expected: &str,
        read: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, TokenizerError> {
        let Some(&value) = self.header.metadata.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| TokenizerError::WrongValue {
            key,
            actual: value.describe(),
            expected: expected.to_owned(),
        })
    }

    fn text(&self, key: &'static str) -> Result<Option<&'a str>, TokenizerError> {
        self.typed(key, "a string", Value::as_text)
    }

    fn bool(&self, key: &'static str) -> Result<Option<bool>, TokenizerError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn texts(&self, key: &'static str) -> Result<Option<Vec<&'a str>>, TokenizerError> {
        match self.typed(key, "an array of strings", Value::as_texts)? {
            None => Ok(None),
            Some(Ok(texts)) => Ok(Some(texts)),
            Some(Err(index)) => Err(TokenizerError::NotUtf8 { key, index }),
        }
    }

    fn token_id(
        &self,
        key: &'static str,
        vocabulary: &Vocabulary<'_>,
    ) -> Result<Option<usize>, TokenizerError> {
        let count = vocabulary.tokens.len();
        self.typed(key, &format!("a token id below {count}"), |value| {
            usize::try_from(value.as_u64()?).ok().filter(|id| *id < count)
        })
    }
}

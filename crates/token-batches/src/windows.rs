//! Fixed windows over a sequence of tokens.

use std::num::NonZeroU64;

use crate::error::DataError;

/// A sequence of tokens cut into windows that do not overlap; the rest at its end is dropped.
/// Invariant: at least one window, each of `window_tokens >= 2` tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    window_tokens: usize,
    token_ids: Vec<u32>,
    window_count: NonZeroU64,
}

impl Windows {
    /// # Errors
    /// When a window is shorter than 2 tokens or the sequence is shorter than one window.
    pub fn cut(mut token_ids: Vec<u32>, window_tokens: usize) -> Result<Self, DataError> {
        check_window(window_tokens)?;
        let window_count = token_ids.len() / window_tokens;
        let Some(count) = NonZeroU64::new(window_count as u64) else {
            return Err(DataError::TooFewTokens { token_count: token_ids.len(), window_tokens });
        };
        token_ids.truncate(window_count * window_tokens);
        Ok(Self { window_tokens, token_ids, window_count: count })
    }

    #[must_use]
    pub fn window_tokens(&self) -> usize {
        self.window_tokens
    }

    #[must_use]
    pub fn count(&self) -> NonZeroU64 {
        self.window_count
    }

    /// The windows in the order of the text.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, u32> {
        self.token_ids.chunks_exact(self.window_tokens)
    }

    /// The window at `index`, or `None` past the last one.
    #[must_use]
    pub fn get(&self, index: u64) -> Option<&[u32]> {
        let index = usize::try_from(index).ok()?;
        self.iter().nth(index)
    }
}

impl<'a> IntoIterator for &'a Windows {
    type Item = &'a [u32];
    type IntoIter = std::slice::ChunksExact<'a, u32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

pub(crate) fn check_window(window_tokens: usize) -> Result<(), DataError> {
    if window_tokens < 2 {
        return Err(DataError::WindowTooShort { window_tokens });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_overlap_and_the_rest_is_dropped() {
        let windows = Windows::cut((0..11).collect(), 4).unwrap();
        assert_eq!(windows.count().get(), 2);
        assert_eq!(windows.iter().collect::<Vec<_>>(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(windows.get(1), Some(&[4, 5, 6, 7][..]));
        assert_eq!(windows.get(2), None);
        assert_eq!(windows.get(u64::MAX), None);
    }

    #[test]
    fn too_few_tokens_and_too_short_windows_are_refused() {
        for (tokens, window_tokens, message) in [
            (3, 4, "the data give 3 tokens, fewer than one window of 4: add text or choose a shorter window"),
            (9, 1, "a window of 1 tokens predicts nothing: at least 2 are needed"),
            (9, 0, "a window of 0 tokens predicts nothing: at least 2 are needed"),
        ] {
            let error = Windows::cut(vec![7; tokens], window_tokens).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }
}

//! Commands in the code blocks of documents, split as a shell would.

/// The commands of a block: words without their quotes. Comments and line continuations are honoured, nothing is expanded.
#[must_use]
pub fn commands(block: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut letters = block.chars().peekable();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), _) if letter == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(letter),
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, '\\') => match letters.next() {
                Some('\n') | None => words.extend(word.take()),
                Some(other) => word.get_or_insert_default().push(other),
            },
            (None, '#') if word.is_none() => while letters.next_if(|letter| *letter != '\n').is_some() {},
            (None, '\n' | ';' | '|' | '&') => {
                words.extend(word.take());
                if !words.is_empty() {
                    commands.push(std::mem::take(&mut words));
                }
            }
            (None, _) if letter.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word.take());
    if !words.is_empty() {
        commands.push(words);
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_splits_them() {
        let block = "a --b 'c \"d\"\n e' \\\n  f  # not this\n# nor this\ng=1 | h \"i j\"&\n";
        let expected: [&[&str]; 3] = [&["a", "--b", "c \"d\"\n e", "f"], &["g=1"], &["h", "i j"]];
        assert_eq!(commands(block), expected);
    }
}

//! Markdown documents, as far as the checks must understand them.

use crate::read;
use std::path::{Path, PathBuf};

/// A document of ours.
#[derive(Debug, Clone)]
pub struct Document {
    /// From the root of the repository.
    pub path: PathBuf,
    /// What is neither code block nor comment, line by line.
    pub prose: Vec<String>,
    /// Code blocks that hold commands: fenced as `sh`, or indented.
    pub commands: Vec<String>,
}

/// All Markdown documents of the repository.
#[must_use]
pub fn documents() -> Vec<Document> {
    crate::files(".", &[".md"]).iter().map(|path| Document::read(path)).collect()
}

impl Document {
    #[must_use]
    pub fn read(path: &Path) -> Self {
        Self::parse(path, &read(path))
    }

    fn parse(path: &Path, text: &str) -> Self {
        let mut document = Self { path: path.to_owned(), prose: Vec::new(), commands: Vec::new() };
        let text = without_comments(text);
        let mut lines = text.lines().peekable();
        let mut after_blank = true;
        while let Some(line) = lines.next() {
            if let Some(language) = line.trim_start().strip_prefix("```") {
                let block: Vec<&str> =
                    lines.by_ref().take_while(|line| !line.trim_start().starts_with("```")).collect();
                if language == "sh" {
                    document.commands.push(block.join("\n"));
                }
            } else if after_blank && line.starts_with("    ") {
                let mut block = vec![line];
                while let Some(line) = lines.next_if(|line| line.starts_with("    ") || line.is_empty()) {
                    block.push(line);
                }
                document.commands.push(block.join("\n"));
                continue;
            } else {
                document.prose.push(line.to_owned());
            }
            after_blank = line.trim().is_empty();
        }
        document
    }

    /// Everything between single backticks in the prose.
    pub fn code_spans(&self) -> impl Iterator<Item = &str> {
        self.prose.iter().flat_map(|line| line.split('`').skip(1).step_by(2))
    }

    /// The targets of links and pictures: what stands between the brackets of `](…)`.
    pub fn links(&self) -> impl Iterator<Item = &str> {
        self.prose
            .iter()
            .flat_map(|line| line.split("](").skip(1).filter_map(|rest| rest.split_once(')')))
            .map(|(target, _)| target)
    }

    /// The commands of all blocks and of code spans.
    #[must_use]
    pub fn all_commands(&self) -> Vec<Vec<String>> {
        let blocks = self.commands.iter().map(String::as_str);
        blocks.chain(self.code_spans()).flat_map(crate::shell::commands).collect()
    }

    /// The anchors of the headings, as GitHub makes them.
    pub fn anchors(&self) -> impl Iterator<Item = String> + use<'_> {
        self.prose.iter().filter_map(|line| {
            let heading = line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' ')?;
            let kept = heading.to_lowercase();
            let kept = kept.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
            Some(kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect())
        })
    }
}

fn without_comments(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("<!--") {
        kept.push_str(before);
        rest = comment.split_once("-->").map_or("", |(_, after)| after);
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_and_commands_are_told_apart() {
        let text = "# A `b`: c-d\n\nSee [it](x.md#y). <!-- [no](gone) -->\n\n```sh\nmake z\n```\n```text\nmake no\n```\n\n    espalier list\n\nEnd.";
        let document = Document::parse(Path::new("a.md"), text);
        assert_eq!(document.commands, ["make z", "    espalier list\n"]);
        assert_eq!(document.links().collect::<Vec<_>>(), ["x.md#y"]);
        assert_eq!(document.code_spans().collect::<Vec<_>>(), ["b"]);
        assert_eq!(document.anchors().collect::<Vec<_>>(), ["a-b-c-d"]);
        assert_eq!(document.all_commands(), [vec!["make", "z"], vec!["espalier", "list"], vec!["b"]]);
    }
}

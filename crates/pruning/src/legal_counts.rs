use model_spec::{LayerSpec, ModelSpec};
use recipe::{FieldViolation, HeadGrouping, Pruning};

/// Which head and channel counts a layer may be left with.
///
/// A result is servable at tensor-parallel degree `tp` when its query heads and channels divide by `tp`, and its
/// key/value heads divide by it or divide it (servers then keep a copy of a head on several ranks).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LegalCounts {
    grouping: HeadGrouping,
    serve_tp: Vec<usize>,
    /// Kept channels are a multiple of this: the least common multiple of `channel_multiple` and the degrees.
    channel_quantum: usize,
}

impl LegalCounts {
    pub(crate) fn new(pruning: &Pruning) -> Result<Self, FieldViolation> {
        if pruning.channel_multiple == 0 {
            return Err(violation("pruning.channel_multiple", "must be at least 1"));
        }
        if pruning.serve_tp.contains(&0) {
            return Err(violation("pruning.serve_tp", "every degree must be at least 1"));
        }
        let mut channel_quantum = pruning.channel_multiple;
        for &degree in &pruning.serve_tp {
            channel_quantum = least_common_multiple(channel_quantum, degree).ok_or_else(|| {
                violation(
                    "pruning.serve_tp",
                    format!(
                        "no channel count is a multiple of {} and of every degree",
                        pruning.channel_multiple
                    ),
                )
            })?;
        }
        Ok(Self { grouping: pruning.head_grouping, serve_tp: pruning.serve_tp.clone(), channel_quantum })
    }

    pub(crate) fn grouping(&self) -> HeadGrouping {
        self.grouping
    }

    pub(crate) fn channel_quantum(&self) -> usize {
        self.channel_quantum
    }

    /// Steps by which a layer's attention narrows: its key/value heads, or its query heads per key/value head.
    pub(crate) fn attention_steps(&self, dense: &LayerSpec) -> usize {
        match self.grouping {
            HeadGrouping::KvGroups => dense.kv_head_count,
            HeadGrouping::QueryHeads => dense.query_heads_per_kv_head(),
        }
    }

    /// The layer with `attention` steps of its heads and `channels` left.
    pub(crate) fn widths(&self, dense: &LayerSpec, attention: usize, channels: usize) -> LayerSpec {
        let (query_head_count, kv_head_count) = match self.grouping {
            HeadGrouping::KvGroups => (attention * dense.query_heads_per_kv_head(), attention),
            HeadGrouping::QueryHeads => (attention * dense.kv_head_count, dense.kv_head_count),
        };
        LayerSpec { query_head_count, kv_head_count, intermediate_size: channels }
    }

    /// The narrowest legal form of a layer, or the layer itself where none is legal.
    pub(crate) fn least(&self, dense: &LayerSpec) -> LayerSpec {
        match self.legal_attention(dense).first() {
            Some(&attention) if self.channel_quantum <= dense.intermediate_size => {
                self.widths(dense, attention, self.channel_quantum)
            }
            Some(_) | None => *dense,
        }
    }

    pub(crate) fn attention_is_legal(&self, dense: &LayerSpec, attention: usize) -> bool {
        let widths = self.widths(dense, attention, 0);
        self.serve_tp.iter().all(|&degree| heads_servable(&widths, degree))
    }

    pub(crate) fn channels_are_legal(&self, channels: usize) -> bool {
        channels.is_multiple_of(self.channel_quantum)
    }

    /// Legal attention steps of a layer, ascending, from 1 to all.
    pub(crate) fn legal_attention(&self, dense: &LayerSpec) -> Vec<usize> {
        (1..=self.attention_steps(dense)).filter(|&steps| self.attention_is_legal(dense, steps)).collect()
    }

    /// Reports the first layer that cannot be left with any legal counts.
    pub(crate) fn check(
        &self,
        dense: &ModelSpec,
        prunable: &[bool],
        channel_multiple: usize,
        found: &mut Vec<FieldViolation>,
    ) {
        for (layer, (widths, &prunable)) in dense.layers.iter().zip(prunable).enumerate() {
            let before = found.len();
            if self.grouping == HeadGrouping::QueryHeads && widths.query_heads_per_kv_head() == 1 {
                found.push(violation(
                    "pruning.head_grouping",
                    format!(
                        "layer {layer} has one query head for each key/value head, so `query_heads` could \
                         remove none; use `kv_groups`"
                    ),
                ));
            }
            if prunable {
                self.check_prunable(layer, widths, channel_multiple, found);
            } else {
                self.check_protected(layer, widths, channel_multiple, found);
            }
            if found.len() > before {
                return;
            }
        }
    }

    fn check_prunable(
        &self,
        layer: usize,
        widths: &LayerSpec,
        channel_multiple: usize,
        found: &mut Vec<FieldViolation>,
    ) {
        let (queries, kvs) = (widths.query_head_count, widths.kv_head_count);
        if self.legal_attention(widths).is_empty() {
            let servable = self.servable_degrees(widths);
            found.push(violation(
                "pruning.serve_tp",
                format!(
                    "no part of the {queries} query and {kvs} key/value heads of layer {layer} can be served at \
                     {}; degrees that can be met one by one: {}",
                    listed(&self.serve_tp),
                    listed(&servable)
                ),
            ));
        }
        let (channels, quantum) = (widths.intermediate_size, self.channel_quantum);
        if quantum > channels {
            let (field, why) = if channel_multiple > channels || self.serve_tp.is_empty() {
                ("pruning.channel_multiple", "it")
            } else {
                ("pruning.serve_tp", "the least common multiple of the degrees and `channel_multiple`")
            };
            found.push(violation(
                field,
                format!("layer {layer} has {channels} channels, but {why} is {quantum}; at most {channels} is possible"),
            ));
        }
    }

    fn check_protected(
        &self,
        layer: usize,
        widths: &LayerSpec,
        channel_multiple: usize,
        found: &mut Vec<FieldViolation>,
    ) {
        let LayerSpec { query_head_count, kv_head_count, intermediate_size } = *widths;
        if let Some(&degree) = self
            .serve_tp
            .iter()
            .find(|&&degree| !heads_servable(widths, degree) || !intermediate_size.is_multiple_of(degree))
        {
            found.push(violation(
                "pruning.serve_tp",
                format!(
                    "layer {layer} is protected, and its {query_head_count} query heads, {kv_head_count} key/value \
                     heads and {intermediate_size} channels cannot be served at {degree}; leave {degree} out or \
                     unprotect the layer"
                ),
            ));
        }
        if !intermediate_size.is_multiple_of(channel_multiple) {
            found.push(violation(
                "pruning.channel_multiple",
                format!(
                    "layer {layer} is protected and keeps {intermediate_size} channels, which is no multiple of \
                     {channel_multiple}"
                ),
            ));
        }
    }

    /// Degrees that some head count of the layer can be served at.
    fn servable_degrees(&self, dense: &LayerSpec) -> Vec<usize> {
        let counts = 1..=self.attention_steps(dense);
        (1..=dense.query_head_count)
            .filter(|&degree| {
                counts.clone().any(|steps| heads_servable(&self.widths(dense, steps, 0), degree))
            })
            .collect()
    }
}

pub(crate) fn violation(field: &str, problem: impl Into<String>) -> FieldViolation {
    FieldViolation { field: field.to_owned(), problem: problem.into() }
}

fn heads_servable(widths: &LayerSpec, degree: usize) -> bool {
    widths.query_head_count.is_multiple_of(degree)
        && (widths.kv_head_count.is_multiple_of(degree) || degree.is_multiple_of(widths.kv_head_count))
}

fn listed(numbers: &[usize]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn least_common_multiple(one: usize, other: usize) -> Option<usize> {
    let (mut divisor, mut rest) = (one, other);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    (one / divisor).checked_mul(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legal(serve_tp: &[usize], channel_multiple: usize, head_grouping: HeadGrouping) -> LegalCounts {
        let pruning =
            Pruning { serve_tp: serve_tp.to_vec(), channel_multiple, head_grouping, ..Pruning::published() };
        LegalCounts::new(&pruning).unwrap()
    }

    #[test]
    fn head_counts_are_those_that_a_server_can_split() {
        let widths = |query_head_count, kv_head_count| LayerSpec {
            query_head_count,
            kv_head_count,
            intermediate_size: 64,
        };
        let (kv, queries) = (HeadGrouping::KvGroups, HeadGrouping::QueryHeads);
        for (layer, grouping, serve_tp, expected) in [
            (widths(8, 8), kv, vec![], vec![1, 2, 3, 4, 5, 6, 7, 8]),
            (widths(8, 8), kv, vec![2], vec![2, 4, 6, 8]),
            (widths(8, 8), kv, vec![2, 4], vec![4, 8]),
            (widths(9, 3), kv, vec![], vec![1, 2, 3]),
            (widths(9, 3), kv, vec![2], vec![2]),
            (widths(9, 3), kv, vec![3], vec![1, 3]),
            (widths(32, 8), kv, vec![4], vec![1, 2, 4, 8]),
            (widths(32, 8), queries, vec![8], vec![1, 2, 3, 4]),
            (widths(32, 8), queries, vec![16], vec![2, 4]),
            (widths(9, 3), queries, vec![2], vec![]),
            (widths(9, 3), kv, vec![4], vec![]),
        ] {
            assert_eq!(
                legal(&serve_tp, 1, grouping).legal_attention(&layer),
                expected,
                "{layer:?} at {serve_tp:?}"
            );
        }
    }

    #[test]
    fn channels_divide_by_the_multiple_and_by_every_degree() {
        let legal = legal(&[2, 6], 8, HeadGrouping::KvGroups);
        assert_eq!(legal.channel_quantum(), 24);
        assert!(legal.channels_are_legal(48) && !legal.channels_are_legal(32));
    }

    #[test]
    fn zero_and_overflowing_multiples_are_refused() {
        for (channel_multiple, serve_tp, field) in [
            (0, vec![], "pruning.channel_multiple"),
            (1, vec![2, 0], "pruning.serve_tp"),
            (usize::MAX, vec![2], "pruning.serve_tp"),
        ] {
            let pruning = Pruning { channel_multiple, serve_tp, ..Pruning::published() };
            assert_eq!(LegalCounts::new(&pruning).unwrap_err().field, field);
        }
    }
}

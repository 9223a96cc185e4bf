use crate::KeepMask;
use model_spec::{LayerSpec, ModelSpec, Projection};

/// Raw group sums of one step, before any normalisation: one value per projection and unit of the unpruned model.
///
/// A unit is a query head for `q_proj` and `o_proj`, a key/value head for `k_proj` and `v_proj`, a channel for
/// `gate_proj`, `up_proj` and `down_proj`. Units that are gone hold exactly 0.
#[derive(Debug, Clone, PartialEq)]
pub struct StepScores {
    layers: Vec<[Vec<f64>; Projection::ALL.len()]>,
}

/// Gathers the ranks' chunks of one step's scores. Chunks may come in any order and be cut anywhere.
#[derive(Debug, Clone)]
pub struct ScoreAssembly {
    scores: StepScores,
    units: Vec<[Vec<Unit>; Projection::ALL.len()]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Gone,
    Awaited,
    Received,
}

/// Why scores cannot be used. Each variant names the place, so that the sending rank can be found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScoreError {
    #[error("scores for layer {layer}, but the model has {layer_count} layers")]
    UnknownLayer { layer: usize, layer_count: usize },
    #[error("layer {layer} `{projection}`: {units} unit indices came with {values} values")]
    LengthMismatch { layer: usize, projection: Projection, units: usize, values: usize },
    #[error("layer {layer} `{projection}`: unit {unit} is not live under the keep mask in force")]
    NotLive { layer: usize, projection: Projection, unit: usize },
    #[error("layer {layer} `{projection}`: unit {unit} was scored twice in one step")]
    Doubled { layer: usize, projection: Projection, unit: usize },
    #[error("layer {layer} `{projection}`: score of unit {unit} is {value}, not a finite number")]
    NotFinite { layer: usize, projection: Projection, unit: usize, value: f64 },
    #[error(
        "layer {layer} `{projection}`: the scores are finite but their norm is not; lower the loss scale"
    )]
    Overflow { layer: usize, projection: Projection },
    #[error("{count} scores are missing; first layer {layer} `{projection}`, units {units:?}")]
    Missing {
        count: usize,
        layer: usize,
        projection: Projection,
        /// The first few missing units of that projection.
        units: Vec<usize>,
    },
}

/// How many units `projection` has in a layer of these widths.
#[must_use]
pub fn unit_count(widths: &LayerSpec, projection: Projection) -> usize {
    match projection {
        Projection::Q | Projection::O => widths.query_head_count,
        Projection::K | Projection::V => widths.kv_head_count,
        Projection::Gate | Projection::Up | Projection::Down => widths.intermediate_size,
    }
}

impl StepScores {
    /// Sums of one projection, by unit of the unpruned model; empty for a layer that does not exist.
    #[must_use]
    pub fn of(&self, layer: usize, projection: Projection) -> &[f64] {
        self.layers.get(layer).map_or(&[], |sums| &sums[projection.index()])
    }
}

impl ScoreAssembly {
    /// Awaits one score for every unit of every projection that `keep` keeps.
    #[must_use]
    pub fn new(dense: &ModelSpec, keep: &KeepMask) -> Self {
        let mut units = Vec::with_capacity(dense.layers.len());
        for (layer, widths) in dense.layers.iter().enumerate() {
            units.push(Projection::ALL.map(|projection| {
                let mut units = vec![Unit::Gone; unit_count(widths, projection)];
                for &live in keep.layers.get(layer).map_or(&[][..], |keep| keep.units(projection)) {
                    if let Some(unit) = units.get_mut(live) {
                        *unit = Unit::Awaited;
                    }
                }
                units
            }));
        }
        let layers = dense
            .layers
            .iter()
            .map(|widths| Projection::ALL.map(|projection| vec![0.0; unit_count(widths, projection)]))
            .collect();
        Self { scores: StepScores { layers }, units }
    }

    /// Takes `values[i]` as the sum of unit `units[i]`, an index into the unpruned model.
    ///
    /// # Errors
    /// Names the first bad entry; the assembly is then as it was before the call.
    pub fn add(
        &mut self,
        layer: usize,
        projection: Projection,
        units: &[usize],
        values: &[f64],
    ) -> Result<(), ScoreError> {
        let layer_count = self.units.len();
        let states = self.units.get_mut(layer).ok_or(ScoreError::UnknownLayer { layer, layer_count })?;
        let states = &mut states[projection.index()];
        let sums = &mut self.scores.layers[layer][projection.index()];
        if units.len() != values.len() {
            let (units, values) = (units.len(), values.len());
            return Err(ScoreError::LengthMismatch { layer, projection, units, values });
        }
        for (taken, (&unit, &value)) in units.iter().zip(values).enumerate() {
            let refusal = match states.get(unit) {
                None | Some(Unit::Gone) => Some(ScoreError::NotLive { layer, projection, unit }),
                Some(Unit::Received) => Some(ScoreError::Doubled { layer, projection, unit }),
                Some(Unit::Awaited) if !value.is_finite() => {
                    Some(ScoreError::NotFinite { layer, projection, unit, value })
                }
                Some(Unit::Awaited) => None,
            };
            if let Some(refusal) = refusal {
                for &unit in &units[..taken] {
                    states[unit] = Unit::Awaited;
                    sums[unit] = 0.0;
                }
                return Err(refusal);
            }
            states[unit] = Unit::Received;
            sums[unit] = value;
        }
        Ok(())
    }

    /// # Errors
    /// When a live unit has no score yet.
    pub fn finish(self) -> Result<StepScores, ScoreError> {
        const NAMED: usize = 8;
        let mut count = 0;
        let mut first = None;
        for (layer, projections) in self.units.iter().enumerate() {
            for projection in Projection::ALL {
                let states = &projections[projection.index()];
                let awaited = || (0..states.len()).filter(|&unit| states[unit] == Unit::Awaited);
                let missing = awaited().count();
                if missing > 0 {
                    count += missing;
                    first.get_or_insert_with(|| (layer, projection, awaited().take(NAMED).collect()));
                }
            }
        }
        match first {
            Some((layer, projection, units)) => Err(ScoreError::Missing { count, layer, projection, units }),
            None => Ok(self.scores),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;

    /// Everything scored 1.0 except for what `skip` picks.
    fn fill(assembly: &mut ScoreAssembly, keep: &KeepMask, skip: impl Fn(usize, Projection) -> bool) {
        for (layer, keep) in keep.layers.iter().enumerate() {
            for projection in Projection::ALL {
                if !skip(layer, projection) {
                    let units = keep.units(projection);
                    assembly.add(layer, projection, units, &vec![1.0; units.len()]).unwrap();
                }
            }
        }
    }

    #[test]
    fn scores_land_at_their_original_index_and_removed_units_are_zero() {
        let dense = model(2, 4, 2, 6);
        let mut keep = KeepMask::full(&dense);
        keep.layers[1].channels = vec![1, 3, 4];
        let mut assembly = ScoreAssembly::new(&dense, &keep);
        fill(&mut assembly, &keep, |layer, projection| (layer, projection) == (1, Projection::Down));
        assembly.add(1, Projection::Down, &[4, 1], &[0.4, 0.1]).unwrap();
        assembly.add(1, Projection::Down, &[3], &[0.3]).unwrap();
        let scores = assembly.finish().unwrap();
        assert_eq!(scores.of(1, Projection::Down), [0.0, 0.1, 0.0, 0.3, 0.4, 0.0]);
        assert_eq!(scores.of(1, Projection::Gate), [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]);
        assert_eq!(scores.of(0, Projection::Q), [1.0; 4]);
        assert_eq!(scores.of(0, Projection::K), [1.0; 2]);
        assert!(scores.of(2, Projection::Q).is_empty());
    }

    #[test]
    fn bad_chunks_are_refused_by_name_and_change_nothing() {
        let dense = model(2, 4, 2, 6);
        let mut keep = KeepMask::full(&dense);
        keep.layers[1].channels = vec![1, 3, 4];
        let mut assembly = ScoreAssembly::new(&dense, &keep);
        assembly.add(0, Projection::V, &[0], &[1.0]).unwrap();
        let (up, v) = (Projection::Up, Projection::V);
        for (layer, projection, units, values, expected) in [
            (2, up, vec![0], vec![1.0], ScoreError::UnknownLayer { layer: 2, layer_count: 2 }),
            (
                1,
                up,
                vec![1, 3],
                vec![1.0],
                ScoreError::LengthMismatch { layer: 1, projection: up, units: 2, values: 1 },
            ),
            (1, up, vec![1, 2], vec![1.0; 2], ScoreError::NotLive { layer: 1, projection: up, unit: 2 }),
            (1, up, vec![1, 6], vec![1.0; 2], ScoreError::NotLive { layer: 1, projection: up, unit: 6 }),
            (1, up, vec![4, 4], vec![1.0; 2], ScoreError::Doubled { layer: 1, projection: up, unit: 4 }),
            (0, v, vec![1, 0], vec![1.0; 2], ScoreError::Doubled { layer: 0, projection: v, unit: 0 }),
            (
                1,
                up,
                vec![3, 1],
                vec![1.0, f64::INFINITY],
                ScoreError::NotFinite { layer: 1, projection: up, unit: 1, value: f64::INFINITY },
            ),
        ] {
            assert_eq!(assembly.add(layer, projection, &units, &values), Err(expected));
        }
        let nan = assembly.add(1, up, &[3], &[f64::NAN]).unwrap_err();
        assert_eq!(nan.to_string(), "layer 1 `up_proj`: score of unit 3 is NaN, not a finite number");
        assembly.add(0, v, &[1], &[1.0]).unwrap();
        fill(&mut assembly, &keep, |layer, projection| (layer, projection) == (0, v));
        assembly.finish().unwrap();
    }

    #[test]
    fn missing_units_are_counted_and_the_first_are_named() {
        let dense = model(2, 4, 2, 6);
        let keep = KeepMask::full(&dense);
        let mut assembly = ScoreAssembly::new(&dense, &keep);
        fill(&mut assembly, &keep, |layer, projection| layer == 1 && projection == Projection::Up);
        assembly.add(1, Projection::Up, &[0, 5], &[1.0, 1.0]).unwrap();
        assert_eq!(
            assembly.finish(),
            Err(ScoreError::Missing {
                count: 4,
                layer: 1,
                projection: Projection::Up,
                units: vec![1, 2, 3, 4]
            })
        );
        let nothing = ScoreAssembly::new(&dense, &keep).finish().unwrap_err();
        assert_eq!(nothing.to_string(), "60 scores are missing; first layer 0 `q_proj`, units [0, 1, 2, 3]");
    }
}

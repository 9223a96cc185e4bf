use super::{Compensated, Hessian, LayerwiseError, LinearWeight, WeightMask};
use crate::linear_algebra::Cholesky;

/// The best that the weights left can do once all others of their row are gone (MRP, arXiv:2410.15567, multiple
/// removal).
///
/// ```text
/// d = -w_P [(H^-1)_PP]^-1 (H^-1)_P,:         loss = w_P [(H^-1)_PP]^-1 w_P^T
/// w_K <- w_K + w_P H_PK H_KK^-1              loss = w_P H_PP w_P^T - w_P H_PK H_KK^-1 H_KP w_P^T
/// ```
///
/// Both say the same, `P` being pruned and `K` kept; the one with the smaller system is solved. The result follows from
/// the mask alone: weights that are zero already stay among the `P`, or they would come back. Rows with the mask of the
/// row above share its factor.
///
/// # Errors
/// When the arguments are not of one shape, or the system is not positive definite.
pub fn mrp_compensate(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    weight_mask: &WeightMask,
) -> Result<Compensated, LayerwiseError> {
    weight.check_hessian(hessian)?;
    weight.check_mask(weight_mask)?;
    let columns = weight.columns;
    let mut compensated = Compensated {
        weight: hessian.without_dead(weight.weight),
        row_losses: Vec::with_capacity(weight.rows),
    };
    let mut system: Option<System> = None;
    for row in 0..weight.rows {
        let is_new = row == 0 || weight_mask.row(row) != weight_mask.row(row - 1);
        if is_new {
            system = Some(System::new(hessian, weight_mask.row(row))?);
        }
        let own = &mut compensated.weight[row * columns..(row + 1) * columns];
        let loss = match &system {
            Some(system) => system.compensate(hessian, own)?,
            None => 0.0,
        };
        if !loss.is_finite() || own.iter().any(|weight| !weight.is_finite()) {
            return Err(LayerwiseError::Overflow { row });
        }
        compensated.row_losses.push(loss);
    }
    Ok(compensated)
}

/// [`mrp_compensate`] where whole inputs go, as in `o_proj` and `down_proj` under structured pruning: one factor for
/// all rows.
///
/// `is_pruned`: by input.
///
/// # Errors
/// As [`mrp_compensate`].
pub fn mrp_compensate_columns(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    is_pruned: &[bool],
) -> Result<Compensated, LayerwiseError> {
    weight.check_hessian(hessian)?;
    mrp_compensate(weight, hessian, &WeightMask::of_columns(weight.rows, is_pruned))
}

/// What losing each group of `group_columns` neighbouring inputs costs at best, all others staying: an importance of
/// heads and channels.
///
/// ```text
/// L_G = tr( W_G [(H^-1)_GG]^-1 W_G^T )
/// ```
///
/// # Errors
/// When the inputs do not divide into such groups.
pub fn mrp_group_losses(
    weight: &LinearWeight<'_>,
    hessian: &Hessian,
    group_columns: usize,
) -> Result<Vec<f64>, LayerwiseError> {
    weight.check_hessian(hessian)?;
    let columns = weight.columns;
    if group_columns == 0 || !columns.is_multiple_of(group_columns) {
        return Err(LayerwiseError::Columns { columns, of: group_columns });
    }
    let live = hessian.without_dead(weight.weight);
    let groups = (0..columns / group_columns).map(|group| {
        let places: Vec<usize> = (group * group_columns..(group + 1) * group_columns).collect();
        let factor = Cholesky::factor(&Hessian::part(hessian.inverse(), columns, &places), group_columns)?;
        let mut loss = 0.0;
        for row in live.chunks_exact(columns) {
            let gone: Vec<f64> = places.iter().map(|&place| row[place]).collect();
            loss += removal_loss(&factor, &gone)?;
        }
        Ok(loss)
    });
    groups.collect()
}

/// `w_P [(H^-1)_PP]^-1 w_P^T`, given the factor of `(H^-1)_PP`.
pub(super) fn removal_loss(factor: &Cholesky, gone: &[f64]) -> Result<f64, LayerwiseError> {
    let mut solved = gone.to_vec();
    factor.solve(&mut solved)?;
    Ok(gone.iter().zip(&solved).map(|(gone, solved)| gone * solved).sum())
}

/// A row's mask with the factor of the smaller side.
struct System {
    pruned: Vec<usize>,
    kept: Vec<usize>,
    /// Of `(H^-1)_PP`, or of `H_KK`.
    factor: Cholesky,
    is_of_pruned: bool,
}

impl System {
    fn new(hessian: &Hessian, is_pruned: &[bool]) -> Result<Self, LayerwiseError> {
        let size = hessian.size();
        let (pruned, kept): (Vec<usize>, Vec<usize>) = (0..size).partition(|&column| is_pruned[column]);
        let is_of_pruned = pruned.len() <= kept.len();
        let factor = if is_of_pruned {
            Cholesky::factor(&Hessian::part(hessian.inverse(), size, &pruned), pruned.len())?
        } else {
            Cholesky::factor(&Hessian::part(hessian.matrix(), size, &kept), kept.len())?
        };
        Ok(Self { pruned, kept, factor, is_of_pruned })
    }

    /// Turns a row into what it becomes, exact zeros included, and says what that costs.
    fn compensate(&self, hessian: &Hessian, row: &mut [f64]) -> Result<f64, LayerwiseError> {
        let size = hessian.size();
        let gone: Vec<f64> = self.pruned.iter().map(|&place| row[place]).collect();
        let loss = if self.is_of_pruned {
            let mut solved = gone.clone();
            self.factor.solve(&mut solved)?;
            for &kept in &self.kept {
                let change: f64 = self
                    .pruned
                    .iter()
                    .zip(&solved)
                    .map(|(&pruned, solved)| solved * hessian.inverse()[pruned * size + kept])
                    .sum();
                row[kept] -= change;
            }
            gone.iter().zip(&solved).map(|(gone, solved)| gone * solved).sum()
        } else {
            let lost_at = |column: usize| -> f64 {
                let terms = self.pruned.iter().zip(&gone);
                terms.map(|(&pruned, gone)| gone * hessian.matrix()[pruned * size + column]).sum()
            };
            let lost: Vec<f64> = self.kept.iter().map(|&kept| lost_at(kept)).collect();
            let mut solved = lost.clone();
            self.factor.solve(&mut solved)?;
            self.kept.iter().zip(&solved).for_each(|(&kept, solved)| row[kept] += solved);
            let whole: f64 =
                self.pruned.iter().zip(&gone).map(|(&pruned, gone)| gone * lost_at(pruned)).sum();
            let regained: f64 = lost.iter().zip(&solved).map(|(lost, solved)| lost * solved).sum();
            (whole - regained).max(0.0)
        };
        self.pruned.iter().for_each(|&place| row[place] = 0.0);
        Ok(loss)
    }
}

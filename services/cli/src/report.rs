//! A run as a picture and as one self-contained page.

mod charts;
mod history;
mod overview;
mod page;
mod panel;
mod removals;
mod scale;
pub(crate) mod summary;
mod svg;

pub(crate) use history::History;
pub(crate) use page::{page, picture};
pub(crate) use removals::{LayerRemovals, Removals};

//! The engine against references: transformers' logits, autograd, finite differences, and a plain PyTorch LoRAPrune.
//! The goldens are in `tests/fixtures`, with the scripts that made them.

mod blocks;
mod chain;
mod compensation;
mod distillation;
mod golden_runs;
mod gradients;
mod group;
mod logits;
mod lora_rite;
mod methods;

mod on_cuda;
mod pieces;
mod products;
mod quantised;
mod resume;
mod skipped;

//! The node's dataplane: Services and endpoints from the API become tables, a plan, and maps of the kernel.
//!
//! ```text
//! watches → tables → desired (pure) → plan: the difference (pure) → reconcile → maps ← programs
//! ```
//!
//! [`run`] is the whole of it; [`Handle::synced`] tells when Services are live; [`cleanup`] leaves nothing.

pub mod desired;
mod links;
pub mod maps;
mod metrics;
pub mod node;
pub mod plan;
pub mod programs;
pub mod reconcile;
mod run;
mod sys;
pub mod tables;

pub use metrics::{Handle, Metrics};
pub use run::{Config, Error, cleanup, run};

#[cfg(test)]
mod tests;

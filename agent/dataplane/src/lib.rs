//! The node's dataplane: Services and endpoints from the API become tables, a plan, and maps of the kernel.
//!
//! ```text
//! watches → tables → desired (pure) → plan: the difference (pure) → reconcile → maps ← programs
//! ```
//!
//! [`run`] is the whole of it and tells when Services are live; [`cleanup`] leaves nothing.

pub mod abandon;
pub mod announce;
pub mod counts;
pub mod desired;
pub mod ejection;
pub mod feed;
mod health;
mod hooks;
mod icmp;
pub mod maglev;
pub mod maps;
mod metrics;
pub mod node;
pub mod observe;
pub mod overlay;
pub mod peers;
pub mod plan;
pub mod policy;
pub mod programs;
pub mod reconcile;
pub mod report;
mod rows;
mod run;
mod serve;
mod sys;
pub mod tables;
mod trouble;
mod watch;
pub mod why;
pub mod xdp;

pub use metrics::Metrics;
pub use run::{Config, Error, PodNetwork, cleanup, run};
pub use serve::ProxyConfig;

/// Bridge of a node's pods. A machine with several nodes has one per network namespace.
pub const BRIDGE: &str = "weft0";
/// VXLAN device to the other nodes.
pub const OVERLAY: &str = "weft.vx";

#[cfg(test)]
mod tests;

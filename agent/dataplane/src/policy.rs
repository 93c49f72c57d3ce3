//! NetworkPolicy: policies, pods and namespaces from the API become sets of rules, identities, and maps of the kernel.
//!
//! ```text
//! watches → objects → planner: what the maps should say (pure) → mirror: the difference → maps ← programs at each pod's edge
//! ```
//!
//! A *peer* is what a rule names: pods by selectors, or a range of addresses. An *identity* is the set of the peers in use that an
//! address belongs to; a *set* is all that the policies of a pod allow it one way. Only what policies of this node's pods
//! name is in use, so a packet costs the same whatever other policies there are, and a change costs what it touches.

pub mod edges;
mod gate;
pub mod local;
pub mod maps;
pub mod mirror;
pub mod objects;
pub mod planner;
mod ranges;
pub mod rules;
mod run;
mod selector;

pub use gate::{Gate, GateError};
pub(crate) use run::{Parts, run};

#[cfg(test)]
mod tests;

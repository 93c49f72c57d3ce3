//! Owns what every cluster has from its first second: namespaces, policy, priorities, the Service `kubernetes`.

mod objects;
pub mod policy;

pub use objects::{bootstrap, BootstrapError};

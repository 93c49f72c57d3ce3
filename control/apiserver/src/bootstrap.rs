//! Owns what every cluster has from its first second: namespaces, policy, priorities, the Service `kubernetes`.

mod objects;
pub(crate) mod policy;

pub use objects::BootstrapError;
pub(crate) use objects::bootstrap;

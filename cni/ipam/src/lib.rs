//! Addresses for pods: which one is next (pure), and who holds which (on disk, safe against a kill at any moment).
#![forbid(unsafe_code)]

mod leases;
mod pool;

pub use leases::{Acquired, Error, Lease, Leases, Lock, Mapped, Owner};
pub use pool::Pool;

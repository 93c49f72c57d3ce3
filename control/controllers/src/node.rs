//! Owns the controllers of nodes: addresses for their pods, health, eviction, and what lost nodes leave behind.

pub(crate) mod eviction;
pub(crate) mod ipam;
pub(crate) mod lifecycle;
pub(crate) mod orphans;

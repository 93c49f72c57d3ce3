//! What the conformance tests share: a cluster for many tests, a namespace for each, and probes that say who answered whom.
#![forbid(unsafe_code)]

mod bed;
mod probe;
mod site;

pub use bed::{Bed, image_archive};
pub use probe::{Outcome, Place, Request, Way};
pub use site::{Said, Site, address_of, node_of, server};

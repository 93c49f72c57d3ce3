//! Kinds of the Kubernetes API, what their schemas say and what schemas can't say. No IO, no async.
#![forbid(unsafe_code)]

mod facts;
pub mod field;
pub mod kinds;
pub mod names;
pub mod schema;
pub mod selector;
pub mod status;

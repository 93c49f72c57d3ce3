//! Kinds of the Kubernetes API, what their schemas say and what schemas can't say. No IO, no async.
#![forbid(unsafe_code)]

pub mod codec;
pub mod discovery;
mod facts;
pub mod field;
pub mod intstr;
pub mod kinds;
pub mod names;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quantity;
pub mod schema;
pub mod selector;
pub mod status;
pub mod strategy;
pub mod table;
pub mod timestamp;

//! Kinds of the Kubernetes API, what their schemas say and what schemas can't say. No IO, no async.
#![forbid(unsafe_code)]

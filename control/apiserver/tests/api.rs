//! The API server as its clients see it: the real kubectl, and plain HTTP for what kubectl never sends.

#[path = "api/kubectl.rs"]
mod kubectl;
#[path = "api/store.rs"]
mod store;
#[path = "api/support.rs"]
mod support;
#[path = "api/access.rs"]
mod access;
#[path = "api/objects.rs"]
mod objects;

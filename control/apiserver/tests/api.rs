//! The API server as its clients see it: the real kubectl, and plain HTTP for what kubectl never sends.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "api/access.rs"]
mod access;
#[path = "api/kubectl.rs"]
mod kubectl;
#[path = "api/kubelet.rs"]
mod kubelet;
#[path = "api/lifetime.rs"]
mod lifetime;
#[path = "api/objects.rs"]
mod objects;
#[path = "api/proxy.rs"]
mod proxy;
#[path = "api/refusals.rs"]
mod refusals;
#[path = "api/services.rs"]
mod services;
#[path = "api/support.rs"]
mod support;

//! The controllers and the scheduler against the real API server on the embedded store. Only the kubelet is played:
//! what it would report is written for it.

#![expect(clippy::unwrap_used, reason = "a test that can't go on fails")]

#[path = "control_plane/kubectl.rs"]
mod kubectl;
#[path = "control_plane/nodes.rs"]
mod nodes;
#[path = "control_plane/ownership.rs"]
mod ownership;
#[path = "control_plane/services.rs"]
mod services;
#[path = "control_plane/support.rs"]
mod support;
#[path = "control_plane/workloads.rs"]
mod workloads;

//! What a pod waits for between its network and its first container.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::Pod;
use weft_agent_runtime::{Error, Sandbox};

use crate::shared::Shared;

/// How long a pod waits before its sandbox is made anew.
const PATIENCE: Duration = Duration::from_secs(30);

type Wait = dyn Fn(Arc<Pod>, Vec<IpAddr>) -> BoxFuture<'static, Result<(), String>> + Send + Sync;

/// Told of a pod and the addresses that its network gave it; done when containers may run there.
#[derive(Clone)]
pub struct PodGate(Arc<Wait>);

impl PodGate {
    /// A gate that asks this function, which answers why not if it never will.
    pub fn new<F>(wait: impl Fn(Arc<Pod>, Vec<IpAddr>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self(Arc::new(move |pod, addresses| Box::pin(wait(pod, addresses))))
    }
}

impl fmt::Debug for PodGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PodGate")
    }
}

/// Waits at the gate, if there is one. A sandbox that may not be used is stopped.
pub(crate) async fn pass(shared: &Shared, pod: &Arc<Pod>, sandbox: Sandbox) -> Result<Sandbox, Error> {
    let Some(PodGate(wait)) = shared.config.pod_gate.as_ref().filter(|_| !sandbox.spec.host_network) else {
        return Ok(sandbox);
    };
    let what = "waiting for the pod's network policies";
    let refused = match tokio::time::timeout(PATIENCE, wait(pod.clone(), sandbox.ips.clone())).await {
        Ok(Ok(())) => return Ok(sandbox),
        Ok(Err(reason)) => Error::Invalid { what, reason },
        Err(_elapsed) => Error::Timeout { what, seconds: PATIENCE.as_secs() },
    };
    shared.runtime.stop_sandbox(&sandbox.id).await?;
    Err(refused)
}

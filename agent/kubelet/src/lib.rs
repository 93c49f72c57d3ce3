//! The kubelet: it runs the pods that the API server has bound to this node, and says how they are.
//!
//! Sources (watch events, runtime events, probe results, timers) go to one worker per pod. A worker keeps what it has
//! observed, a pure function says what is to be done next (`plan`), another what the API server shall see (`status`).
#![forbid(unsafe_code)]

mod admission;
mod backoff;
mod clock;
mod config;
mod dns;
mod env;
mod events;
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod hooks;
mod http_get;
mod images;
mod logs;
mod metrics;
mod network;
mod node;
mod objects;
mod observed;
mod plan;
mod pod;
mod pods;
mod pollable;
mod probes;
mod quantity;
mod resources;
mod security;
mod server;
mod services;
mod shared;
mod spec;
mod start;
mod status;
mod status_writer;
mod terminating;
mod tokens;
mod volumes;
mod worker;

#[cfg(test)]
mod fake;

pub use config::{CapacityOverrides, Config, ServerTls};
pub use gate::PodGate;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_agent_runtime::Runtime;

/// Why the kubelet could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is wrong.
    #[error("invalid kubelet configuration: {0}")]
    Config(String),
    /// A folder could not be made or read.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The address of the kubelet's server is taken.
    #[error("cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Certificate, key or CA can't be used.
    #[error("cannot use the kubelet's TLS material")]
    Tls(#[from] rustls::Error),
    /// The runtime does not answer.
    #[error("the container runtime does not answer")]
    Runtime(#[from] weft_agent_runtime::Error),
    /// The API server refused something that is needed to go on.
    #[error("cannot {op}")]
    Api {
        /// What was asked for.
        op: &'static str,
        /// Its answer.
        #[source]
        source: Box<kube::Error>,
    },
    /// A task of the kubelet panicked.
    #[error("task {0} ended unexpectedly")]
    Task(&'static str),
}

/// Runs the kubelet until `shutdown`. Pods are left running; the next start adopts them.
///
/// # Errors
/// When the configuration is wrong, the port is taken, or the runtime does not answer at the start. Whatever fails
/// later is retried within.
pub async fn run(
    config: Config,
    client: kube::Client,
    runtime: Arc<dyn Runtime>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.check()?;
    for dir in [config.pods_dir(), config.pod_log_dir.clone()] {
        weft_agent_runtime::folders::make_spread(&dir).map_err(|source| Error::Io {
            op: "create",
            path: dir,
            source,
        })?;
    }
    let memory = config.memory_dir();
    volumes::memory::ensure(&memory).map_err(|source| Error::Io { op: "mount", path: memory, source })?;
    let listener = server::Listener::bind(&config).await?;
    // Subscribe first, list second: nothing falls between.
    let runtime_events = runtime.events();
    let found = pods::Found {
        sandboxes: runtime.list_sandboxes().await?,
        containers: runtime.list_containers().await?,
    };

    let (shared, event_queue) = shared::Shared::new(config, client, runtime);
    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let stop = shutdown.child_token();
    tasks.spawn(named("events", events::run(event_queue, shared.client.clone(), stop.clone())));
    tasks.spawn(named("node", node::run(shared.clone(), stop.clone())));
    tasks.spawn(named("lease", node::lease::run(shared.clone(), stop.clone())));
    tasks.spawn(named("services", services::run(shared.clone(), stop.clone())));
    tasks.spawn(named("server", server::run(listener, shared.clone(), stop.clone())));
    tasks.spawn(named("pods", pods::run(shared, found, runtime_events, stop.clone())));

    let mut failed = None;
    while let Some(ended) = tasks.join_next().await {
        if !stop.is_cancelled() {
            failed = Some(ended.unwrap_or("?"));
            stop.cancel();
        }
    }
    failed.map_or(Ok(()), |name| Err(Error::Task(name)))
}

/// Unmounts and removes all that the kubelet keeps of a node's pods. For a node whose kubelet and pods have ended for
/// good; succeeds on one that is gone. Must run in the mount namespace of that kubelet.
///
/// # Errors
/// When something is still mounted or can't be removed.
pub fn purge(data_dir: &Path, run_dir: &Path, node: &str) -> Result<(), Error> {
    let dir = config::pods_dir(data_dir, node);
    volumes::remove::pod_dir(&dir).map_err(|source| Error::Io { op: "remove", path: dir, source })?;
    let memory = config::memory_dir(run_dir, node);
    volumes::memory::remove(&memory).map_err(|source| Error::Io { op: "remove", path: memory, source })
}

async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

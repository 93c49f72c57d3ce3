//! Owns the scheduler: binds each pending pod to the best node. Decisions are made one after another on a cache that
//! is always current; bindings are sent side by side.
#![forbid(unsafe_code)]

mod cache;
mod decide;
mod filter;
mod metrics;
mod pod;
mod queue;
mod resources;
mod score;
mod work;

pub use metrics::Metrics;

use kube::Client;
use std::convert::Infallible;
use tokio_util::sync::CancellationToken;
use weft_control_client::leader::{self, Election};

/// Name of the lease.
const LEASE: &str = "kube-scheduler";

/// How the scheduler works.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name under which the lease is held; the same after a restart.
    pub identity: String,
    /// Whether to work only while holding the lease.
    pub leader_election: bool,
    /// Which pods are ours: their `schedulerName`.
    pub scheduler_name: String,
    /// Where to count.
    pub metrics: Metrics,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            identity: LEASE.into(),
            leader_election: true,
            scheduler_name: "default-scheduler".into(),
            metrics: Metrics::default(),
        }
    }
}

/// Why the scheduler can't run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration can't work.
    #[error("the scheduler's configuration is wrong: {0}")]
    Config(&'static str),
}

/// Schedules pods until `shutdown`.
pub async fn run(config: Config, client: Client, shutdown: CancellationToken) -> Result<(), Error> {
    if config.identity.is_empty() || config.scheduler_name.is_empty() {
        return Err(Error::Config("the identity and the scheduler's name must not be empty"));
    }
    let term = |token: CancellationToken| {
        let (client, config) = (client.clone(), config.clone());
        async move {
            work::run(config, client, token).await;
            Ok::<(), Infallible>(())
        }
    };
    let ended = if config.leader_election {
        let election = Election {
            namespace: "kube-system".into(),
            name: LEASE.into(),
            identity: config.identity.clone(),
        };
        leader::run(client.clone(), &election, &shutdown, term).await
    } else {
        term(shutdown).await
    };
    match ended {
        Ok(()) => Ok(()),
    }
}

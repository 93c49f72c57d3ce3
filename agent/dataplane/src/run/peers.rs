//! The cluster's nodes, and which of them don't answer.

use std::net::IpAddr;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::Config;
use crate::metrics::Metrics;
use crate::peers::memory::Memory;
use crate::peers::{self, Nodes, Told, Turn};

/// What the dataplane keeps of the other nodes.
pub(super) struct Peers {
    /// An address of the family at which they are asked.
    pub(super) like: IpAddr,
    pub(super) nodes: Nodes,
    /// To those who ask them.
    pub(super) tell: watch::Sender<Nodes>,
    pub(super) silent: watch::Receiver<Nodes>,
    pub(super) memory: Memory,
}

/// Begins to watch them: the dataplane's end, and what has to run beside it. Who falls silent or comes back goes to `turns`.
pub(super) fn begin(
    config: &Config,
    metrics: Metrics,
    turns: mpsc::Sender<Turn>,
    shutdown: CancellationToken,
) -> (Peers, impl Future<Output = ()> + use<>) {
    let (tell, known) = watch::channel(Nodes::new());
    let (say, silent) = watch::channel(Nodes::new());
    let told = Told { turns: Some(turns), ..Told::new(say, move |counts| metrics.peers(counts)) };
    let watching = peers::Config {
        node_name: config.node_name.clone(),
        watched: peers::WATCHED,
        pins: config.pin_dir.clone(),
    };
    let memory = Memory::of(&config.pin_dir);
    let own = Peers { like: config.node_ip, nodes: Nodes::new(), tell, silent, memory };
    (own, peers::run(watching, known, told, shutdown))
}

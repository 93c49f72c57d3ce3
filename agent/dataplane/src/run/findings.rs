//! What the node finds out about the network that joins it with the others: taken in, and told of.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Dataplane;
use crate::overlay::inquiry::Inquiry;
use crate::overlay::offload::{self, Broken, Witnesses};
use crate::overlay::width::{self, Ways, Widths};
use crate::trouble::Finding;

/// What is to be told of while the API is slow. A link that becomes narrow does so towards all nodes at once.
const MAX_FINDINGS: usize = 64;

/// What the dataplane keeps of it.
pub(super) struct Findings {
    pub(super) widths: Inquiry<Ways, Widths>,
    pub(super) checksums: Inquiry<Witnesses, Option<Broken>>,
    tell: mpsc::Sender<Finding>,
}

/// Begins to look: the dataplane's end, what is to be told, and what has to run beside it.
pub(super) fn begin(
    shutdown: &CancellationToken,
) -> (Findings, mpsc::Receiver<Finding>, impl Future<Output = ()> + use<>) {
    let (widths, measuring) = width::begin(shutdown.clone());
    let (tell, told) = mpsc::channel(MAX_FINDINGS);
    let (checksums, testing) = offload::begin(shutdown.clone());
    let both = async {
        tokio::join!(measuring, testing);
    };
    (Findings { widths, checksums, tell }, told, both)
}

impl Dataplane {
    /// Takes in what ways to other nodes are narrow.
    pub(super) fn take_widths(&mut self) {
        let found = self.findings.widths.found.borrow_and_update().clone();
        self.shared.metrics.narrow_ways(found.len());
        for (address, takes_bytes) in width::turns(self.overlay.found(), &found) {
            let node = self.name_of(address);
            match takes_bytes {
                Some(takes_bytes) => {
                    tracing::warn!(%node, %address, takes_bytes, "larger packets don't get to a node, though the link takes them");
                }
                None => {
                    tracing::info!(%node, %address, "all packets that the link takes get to a node, or it is gone")
                }
            }
            self.tell(Finding::Width { node, address, takes_bytes });
        }
        self.overlay.set_found(found);
    }

    /// Takes in whether the card breaks checksums within tunnels.
    pub(super) fn take_broken(&mut self) {
        let broken = *self.findings.checksums.found.borrow_and_update();
        let witness = broken.map(|broken| self.name_of(broken.witness));
        match &witness {
            Some(node) => {
                tracing::warn!(%node, "the network card breaks checksums within tunnels: nothing is left to it any more");
            }
            None => tracing::info!("checksums within tunnels are left to the network card again"),
        }
        self.overlay.set_broken(broken);
        self.tell(Finding::Checksums { broken: witness });
    }

    /// The name of the node that has an address; the address itself if it has gone meanwhile.
    fn name_of(&self, address: IpAddr) -> Arc<str> {
        let name = self.overlay.name_of(address);
        name.map_or_else(|| address.to_string().into(), Into::into)
    }

    fn tell(&self, finding: Finding) {
        // Behind a queue that is full, the log and the metric have it.
        let _ = self.findings.tell.try_send(finding);
    }
}

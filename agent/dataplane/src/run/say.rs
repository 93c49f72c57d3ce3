//! What the node says of its Services to the rest of the cluster.

use super::Dataplane;

/// Resource versions of the Services that came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Versions {
    pub(super) newest: u64,
    /// The newest that changed what is to be programmed.
    pub(super) changed: u64,
}

impl Dataplane {
    /// Says how far the maps have come. Half a list says nothing of the rest.
    pub(super) fn report(&self) {
        let Some(reports) = self.reports.as_ref().filter(|_| !self.relists.lists_services()) else { return };
        let unprogrammed = self.reconciler.unprogrammed();
        reports.send_if_modified(|report| {
            let same = unprogrammed.len() == report.failing.len()
                && unprogrammed.iter().all(|(name, state)| report.failing.get(name) == Some(&state.reason));
            if !same {
                report.failing =
                    unprogrammed.iter().map(|(name, state)| (name.clone(), state.reason.clone())).collect();
            }
            let news = !same || report.version != self.seen.newest || report.awaited != self.seen.changed;
            (report.version, report.awaited) = (self.seen.newest, self.seen.changed);
            report.nodes = self.peers.nodes.len();
            news
        });
    }
}

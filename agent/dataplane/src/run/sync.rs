//! Brings overlay, maps and programs to what is known.

use std::collections::BTreeMap;
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use weft_ebpf_abi::NODE_DIRECT;

use super::{Dataplane, MAX_TRIGGERS, RETRY_FIRST};
use crate::maps::Table;
use crate::metrics::Synced;
use crate::sys;

impl Dataplane {
    /// Nothing is written before all sources are known: half of them would empty the lists of maps that were adopted. Where none
    /// were, Services are written as their list comes, each with all its endpoints.
    pub(super) fn sync(&mut self) {
        if !self.relists.all_known() {
            if self.begins_empty && self.relists.all_but_services_known() && self.reconciler.is_dirty() {
                self.sync_maps();
            }
            return;
        }
        if self.overlay.is_dirty() || self.ways_untold {
            self.sync_ways();
        }
        if self.ejecting.is_behind() {
            self.watch_sockets();
        }
        if self.reconciler.is_dirty() {
            self.sync_maps();
        }
        if !self.is_behind() {
            self.retry = RETRY_FIRST;
        }
        if self.reconciler.is_settled() {
            self.report();
            self.programmed.send_if_modified(|is| !std::mem::replace(is, true));
        }
    }

    /// Whether the kernel lags behind what is known.
    pub(super) fn is_behind(&self) -> bool {
        self.reconciler.is_dirty() || self.overlay.is_dirty() || self.ejecting.is_behind()
    }

    /// Brings the overlay up to date, and tells of it. A change of Services has no part in that.
    fn sync_ways(&mut self) {
        if self.overlay.is_dirty() {
            // What may change counts as the tunnel's until it has: there is a route into that at any time.
            self.tell_ways();
            if let Err(error) = self.overlay.sync() {
                tracing::warn!(%error, source = ?std::error::Error::source(&error), "overlay is behind, will be retried");
            }
            self.tell_tunnels();
        }
        self.ways_untold = !self.tell_ways();
        if !self.overlay.is_dirty() {
            self.links.set(self.overlay.trials());
            self.findings.widths.set(self.overlay.ways());
            self.findings.checksums.set(self.overlay.witnesses());
            self.shared.metrics.leaves_checksums(self.overlay.leaves_checksums());
        }
    }

    /// Tells the programs who is reached past the tunnel, whose clients' packets go with what these asked for, and what fits by every
    /// way; what doesn't is the stack's. Answers whether they know.
    fn tell_ways(&mut self) -> bool {
        let near = self.overlay.near();
        let is_direct = self.identity.flags & NODE_DIRECT != 0;
        let direct = if is_direct { self.overlay.direct() } else { BTreeMap::new() };
        let told = self.near.set(&near).and_then(|()| self.direct.set(&direct)).and_then(|()| {
            let identity = self.overlay.describe(self.identity);
            if identity != self.identity {
                self.programs.configure(identity)?;
                self.identity = identity;
            }
            Ok(())
        });
        if let Err(error) = &told {
            tracing::warn!(%error, source = ?std::error::Error::source(error), "programs are behind the ways to other nodes, will be told again");
        }
        told.is_ok()
    }

    /// Tells the programs which packets are the tunnels' own, which they need not look up.
    fn tell_tunnels(&mut self) {
        if let Err(error) = self.tunnels.set(&self.overlay.tunnels()) {
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "programs don't know all tunnels, and look their packets up");
        }
    }

    fn sync_maps(&mut self) {
        let started = Instant::now();
        let report = self.reconciler.sync();
        let took = started.elapsed();
        if report.full {
            sys::give_memory_back();
        }
        tracing::debug!(applied = report.applied, failed = report.failed, ?took, "maps synchronised");
        let (totals, unprogrammed) = (self.reconciler.totals(), self.reconciler.unprogrammed());
        let metrics = &self.shared.metrics;
        metrics.synced(&Synced {
            took,
            full: report.full,
            failed: report.failed,
            unprogrammed: unprogrammed.len(),
            totals,
        });
        for table in Table::ALL {
            metrics.holds(table, self.reconciler.entries(table));
        }
        // A Service that fails says so itself; the proxy keeps up as long as others get through.
        if report.failed == 0 || unprogrammed.len() < totals.services {
            self.shared.health.lock().updated();
        }
        let now = Timestamp::now();
        self.triggers.retain(|(service, trigger)| {
            let waits = unprogrammed.contains_key(service);
            if !waits {
                metrics.programmed(now.duration_since(*trigger).as_secs_f64());
            }
            waits
        });
        let excess = self.triggers.len().saturating_sub(MAX_TRIGGERS);
        self.triggers.drain(..excess);
        for (service, reason) in self.reconciler.take_troubles() {
            tracing::warn!(%service, reason, "service is not programmed, will be retried");
            // Behind a queue that is full, the log and the metric have it.
            let _ = self.troubles.try_send((service, reason));
        }
        self.checks.apply(self.reconciler.take_health_changes());
        self.searches.add(self.reconciler.take_left());
        self.watch_backends();
        if let Some(mut answers) = self.reconciler.take_answers() {
            answers.retain(|ip| self.balancer_pools.iter().any(|pool| pool.contains(*ip)));
            self.answers.send_replace(answers);
        }
    }
}

//! Backends whose connections fail: taken in, told of, and watched for.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::sync::mpsc;

use super::Dataplane;
use crate::ejection::{self, EjectionError, Ejections};
use crate::maps::kernel::KernelMaps;
use crate::programs::Programs;
use crate::reconcile::Reconciler;
use crate::trouble::Ejection;

/// The watch over backends' connections.
pub(super) struct Ejecting {
    ejections: Ejections,
    tell: mpsc::Sender<Ejection>,
    /// The root of cgroup2.
    cgroup2: PathBuf,
    /// Sockets' connections are not watched as they should be.
    behind: bool,
}

impl Ejecting {
    /// What an earlier agent ejected stays out from the first synchronisation on.
    pub(super) fn adopt(
        programs: &Programs,
        reconciler: &mut Reconciler<KernelMaps>,
        cgroup2: PathBuf,
        tell: mpsc::Sender<Ejection>,
    ) -> Result<Self, EjectionError> {
        let ejections = Ejections::adopt(programs, ejection::now())?;
        reconciler.tables.set_ejected(ejections.ejected());
        Ok(Self { ejections, tell, cgroup2, behind: false })
    }

    /// Whether the kernel lags behind.
    pub(super) fn is_behind(&self) -> bool {
        self.behind
    }

    /// Waits until there is something to take. May be dropped at any time.
    pub(super) async fn ready(&mut self) {
        self.ejections.ready().await;
    }
}

impl Dataplane {
    /// Takes in which backends' connections fail.
    pub(super) fn take_ejections(&mut self) {
        for turn in self.ejecting.ejections.take(ejection::now()) {
            let backend = SocketAddr::new(turn.backend.address.into(), turn.backend.port.get());
            match turn.seconds {
                Some(seconds) => {
                    self.shared.metrics.ejected();
                    tracing::warn!(%backend, seconds, "connections to a backend failed: it is left out");
                }
                None => tracing::info!(%backend, "a backend is tried again"),
            }
            for service in self.reconciler.watchers(&turn.backend) {
                // Behind a queue that is full, the log and the metric have it.
                let _ = self.ejecting.tell.try_send((service, turn));
            }
        }
        self.enter_ejected();
    }

    /// Has those backends watched whose Services want it, and sockets' connections while there are any.
    pub(super) fn watch_backends(&mut self) {
        let Some(wanted) = self.reconciler.take_watched() else { return };
        self.ejecting.ejections.watch(&wanted);
        self.watch_sockets();
        // Another pod may have taken an ejected one's address.
        self.enter_ejected();
    }

    /// Has sockets' connections watched while any backend is.
    pub(super) fn watch_sockets(&mut self) {
        let Ejecting { ejections, cgroup2, behind, .. } = &mut self.ejecting;
        let done = self.programs.watch_sockets(cgroup2, ejections.is_watching());
        *behind = done.is_err();
        if let Err(error) = done {
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "sockets' connections are not watched, will be retried");
        }
    }

    fn enter_ejected(&mut self) {
        let changed = self.reconciler.tables.set_ejected(self.ejecting.ejections.ejected());
        self.mark(changed);
    }
}

//! What a worker knows about its pod on this node: the input of `plan` and `status`. Plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use weft_agent_runtime as runtime;

use crate::backoff::Backoffs;

/// Annotation and label names that upstream's kubelet gives containers.
pub(crate) mod keys {
    pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
    pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    pub(crate) const POD_UID: &str = "io.kubernetes.pod.uid";
    pub(crate) const HASH: &str = "io.kubernetes.container.hash";
    pub(crate) const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    pub(crate) const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    pub(crate) const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Where the termination message is on the node.
    pub(crate) const MESSAGE_FILE: &str = "weft.terminationMessageFile";
    pub(crate) const GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// The image as the pod named it.
    pub(crate) const IMAGE: &str = "weft.image";
}

/// The pod's sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SandboxView {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) ready: bool,
    pub(crate) ips: Vec<IpAddr>,
}

impl From<&runtime::Sandbox> for SandboxView {
    fn from(s: &runtime::Sandbox) -> Self {
        Self { id: s.id.clone(), attempt: s.spec.attempt, ready: s.ready, ips: s.ips.clone() }
    }
}

/// One attempt of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerView {
    pub(crate) id: String,
    pub(crate) sandbox_id: String,
    pub(crate) attempt: u32,
    pub(crate) hash: String,
    pub(crate) image: String,
    pub(crate) image_id: String,
    pub(crate) state: runtime::ContainerState,
    /// Its termination message, read once when it has ended.
    pub(crate) message: Option<String>,
    /// The file with it, and whether logs stand in for an empty one.
    pub(crate) message_file: Option<(std::path::PathBuf, bool)>,
}

impl From<&runtime::Container> for ContainerView {
    fn from(c: &runtime::Container) -> Self {
        let annotation = |key: &str| c.spec.annotations.get(key).cloned().unwrap_or_default();
        let file = annotation(keys::MESSAGE_FILE);
        let fallback = annotation(keys::MESSAGE_POLICY) == "FallbackToLogsOnError";
        Self {
            id: c.id.clone(),
            sandbox_id: c.sandbox_id.clone(),
            attempt: c.spec.attempt,
            hash: annotation(keys::HASH),
            image: c.spec.annotations.get(keys::IMAGE).cloned().unwrap_or_else(|| c.spec.image.clone()),
            image_id: c.image_id.clone(),
            state: c.state.clone(),
            message: None,
            message_file: (!file.is_empty()).then(|| (file.into(), fallback)),
        }
    }
}

impl ContainerView {
    pub(crate) fn running(&self) -> bool {
        matches!(self.state, runtime::ContainerState::Running { .. })
    }

    pub(crate) fn exit(&self) -> Option<&runtime::Exit> {
        if let runtime::ContainerState::Exited(exit) = &self.state { Some(exit) } else { None }
    }
}

/// What the probes have said about one container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProbeState {
    /// The readiness probe's verdict; `None` before the first.
    pub(crate) ready: Option<bool>,
    /// The startup probe has succeeded.
    pub(crate) started: bool,
    /// The liveness probe has failed often enough.
    pub(crate) liveness_failed: bool,
    /// The startup probe has failed often enough.
    pub(crate) startup_failed: bool,
}

/// Why a container is not there yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) reason: String,
    pub(crate) message: String,
    /// When to try again.
    pub(crate) retry_at: Timestamp,
}

/// Why a pod ends before its containers do so by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The API server was asked to delete it.
    Deleted,
    /// It is no longer in the API.
    Removed,
    /// It is over its `activeDeadlineSeconds`.
    DeadlineExceeded,
    /// The node refused it: reason and message.
    Rejected { reason: String, message: String },
    /// All its containers have ended by themselves, or the API says so already.
    Finished,
}

/// Everything a worker knows.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// All volumes are mounted.
    pub(crate) volumes_ready: bool,
    /// Mounting failed: try again then.
    pub(crate) volumes_retry_at: Option<Timestamp>,
    /// The newest sandbox.
    pub(crate) sandbox: Option<SandboxView>,
    /// Making a sandbox failed: try again then.
    pub(crate) sandbox_retry_at: Option<Timestamp>,
    /// Attempts of each container, oldest first.
    pub(crate) containers: BTreeMap<String, Vec<ContainerView>>,
    /// Probe verdicts by container id.
    pub(crate) probes: BTreeMap<String, ProbeState>,
    /// Containers that could not be made or started, by name.
    pub(crate) waiting: BTreeMap<String, Waiting>,
    /// Crash back-off by container name.
    pub(crate) crashes: Backoffs,
    /// Image back-off by image.
    pub(crate) images: Backoffs,
    /// Ids of the containers that are being stopped.
    pub(crate) stopping: BTreeSet<String>,
    /// A step (mount, sandbox, start) is under way.
    pub(crate) busy: bool,
    /// Set once the pod is to end.
    pub(crate) ending: Option<Ending>,
    /// The sandbox has been stopped for good.
    pub(crate) sandbox_stopped: bool,
}

impl Observed {
    /// The newest attempt of a container.
    pub(crate) fn latest(&self, name: &str) -> Option<&ContainerView> {
        self.containers.get(name)?.last()
    }

    /// The newest attempt within the present sandbox.
    pub(crate) fn current(&self, name: &str) -> Option<&ContainerView> {
        let sandbox = self.sandbox.as_ref()?;
        self.latest(name).filter(|c| c.sandbox_id == sandbox.id)
    }

    /// The attempt before the newest.
    pub(crate) fn previous(&self, name: &str) -> Option<&ContainerView> {
        self.containers.get(name)?.iter().rev().nth(1)
    }

    /// Every attempt of every container.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&String, &ContainerView)> {
        self.containers.iter().flat_map(|(name, list)| list.iter().map(move |c| (name, c)))
    }

    /// Puts a view in its place, replacing an older reading of the same container.
    pub(crate) fn record(&mut self, name: &str, view: ContainerView) {
        let list = self.containers.entry(name.to_owned()).or_default();
        if let Some(known) = list.iter_mut().find(|c| c.id == view.id) {
            let message = known.message.take();
            *known = view;
            known.message = known.message.take().or(message);
        } else {
            list.push(view);
            list.sort_by_key(|c| c.attempt);
        }
    }

    /// Something of the pod is still running.
    pub(crate) fn any_running(&self) -> bool {
        self.all().any(|(_, c)| c.running())
    }
}

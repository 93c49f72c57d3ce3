//! Makes and starts one container: image, environment, mounts, create, start, postStart hook.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};

use weft_agent_runtime::chain;

use crate::env::{self, Facts};
use crate::events::Kind;
use crate::hooks;
use crate::images;
use crate::observed::{ContainerView, SandboxView};
use crate::pod::{self, PodId};
use crate::security;
use crate::shared::Shared;
use crate::spec;
use crate::volumes::{self, Mounted};
use crate::worker::Message;

/// What a start needs.
pub(crate) struct Order {
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) attempt: u32,
    pub(crate) sandbox: SandboxView,
    pub(crate) mounted: Arc<Mounted>,
    /// A record that was made but never started.
    pub(crate) replaces: Option<String>,
    /// Told of the container as soon as it runs, before its hook ends.
    pub(crate) running: crate::worker::Inbox,
}

/// Why it did not start: the waiting reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: String,
    pub(crate) message: String,
    /// The container exists nevertheless (it ended at once).
    pub(crate) view: Option<ContainerView>,
}

impl Failure {
    fn new(reason: &str, message: String) -> Self {
        Self { reason: reason.to_owned(), message, view: None }
    }
}

/// Addresses that fields and hooks may name.
pub(crate) fn facts(shared: &Shared, pod: &Pod, sandbox: Option<&SandboxView>) -> Facts {
    let node_ips = shared.config.node_ips();
    let pod_ips: Vec<IpAddr> = if pod::host_network(pod) {
        node_ips.clone()
    } else {
        sandbox.map(|s| pod::ordered_ips(&s.ips, shared.config.node_ip)).unwrap_or_default()
    };
    Facts { node_ips, pod_ips, allocatable: shared.machine.allocatable() }
}

/// Carries out an order.
pub(crate) async fn run(shared: Arc<Shared>, order: Order) -> Result<ContainerView, Failure> {
    let (pod, container) = (&order.pod, &order.container);
    let say = |kind, reason, message: String| {
        shared.events.container(pod, &container.name, (kind, reason), message)
    };
    let image = images::ensure(&shared, pod, container)
        .await
        .map_err(|missing| Failure::new(missing.reason, missing.message))?;
    let config_error = |message: String| {
        say(Kind::Warning, "Failed", format!("Error: {message}"));
        Failure::new("CreateContainerConfigError", message)
    };
    let facts = facts(&shared, pod, Some(&order.sandbox));
    let env = env::make(&shared, pod, container, &facts).await.map_err(|e| config_error(e.to_string()))?;
    let security = security::make(pod, container, &image.user).map_err(|e| config_error(e.to_string()))?;
    let files = write_files(&shared, &order, &facts).map_err(|e| config_error(e.to_string()))?;
    let mut mounts = volumes::mounts::of(&shared, pod, container, &order.mounted, &env)
        .map_err(|e| config_error(e.to_string()))?;
    mounts.extend(spec::own_mounts(container, &files.hosts, &files.message));
    let parts = spec::Parts {
        attempt: order.attempt,
        image_id: image.id,
        env,
        mounts,
        security,
        message_file: files.message,
        node_memory_bytes: shared.machine.memory_bytes,
    };
    if let Some(stale) = &order.replaces {
        // One that can't be removed makes the create below fail, which is reported.
        let _ = shared.runtime.remove_container(stale).await;
    }
    let id = match shared
        .runtime
        .create_container(&order.sandbox.id, spec::container(pod, container, parts))
        .await
    {
        Ok(id) => id,
        Err(error) => {
            say(Kind::Warning, "Failed", format!("Error: {error}"));
            return Err(Failure::new("CreateContainerError", error.to_string()));
        }
    };
    say(Kind::Normal, "Created", "Container created".to_owned());
    launch(&shared, &order, &id, &facts).await
}

async fn launch(
    shared: &Arc<Shared>,
    order: &Order,
    id: &str,
    facts: &Facts,
) -> Result<ContainerView, Failure> {
    let (pod, container) = (&order.pod, &order.container);
    let say = |kind, reason, message: String| {
        shared.events.container(pod, &container.name, (kind, reason), message)
    };
    let started = shared.runtime.start_container(id).await;
    let view = shared.runtime.container(id).await.map(|c| ContainerView::from(&c));
    let view = match (started, view) {
        (Ok(()), Ok(view)) => view,
        (Err(error), view) => {
            say(Kind::Warning, "Failed", format!("Error: {error}"));
            let view = view.ok().filter(|v| v.exit().is_some());
            return Err(Failure { reason: "RunContainerError".into(), message: error.to_string(), view });
        }
        (Ok(()), Err(error)) => return Err(Failure::new("RunContainerError", error.to_string())),
    };
    say(Kind::Normal, "Started", "Container started".to_owned());
    shared.metrics.started_containers.inc();
    let hook = container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref());
    let Some(hook) = hook else { return Ok(view) };
    // A closed inbox means that the worker is gone, and this job with it.
    let _ = order.running.send(Message::Running(Box::new(view.clone()), container.name.clone())).await;
    let ip = facts.pod_ips.first().map(ToString::to_string).unwrap_or_default();
    if let Err(error) = hooks::run(&shared.runtime, (pod, &container.name, id), hook, &ip).await {
        say(Kind::Warning, "FailedPostStartHook", "PostStartHook failed".to_owned());
        tracing::warn!(pod = %PodId::of(pod), container = container.name, error = %chain(&error), "postStart hook failed");
        say(Kind::Normal, "Killing", "FailedPostStartHook".to_owned());
        // Its exit is reported by the runtime's event like any other.
        let _ = shared.runtime.stop_container(id, Duration::from_secs(2)).await;
        let view = shared.runtime.container(id).await.ok().map(|c| ContainerView::from(&c));
        return Err(Failure { reason: "PostStartHookError".into(), message: chain(&error), view });
    }
    Ok(view)
}

/// What the API server answered, or why it could not be asked.
pub(crate) fn api_error(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error { status.message.clone() } else { chain(error) }
}

struct Files {
    hosts: PathBuf,
    message: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write {path:?}: {source}")]
struct FileError {
    path: PathBuf,
    source: std::io::Error,
}

/// The hosts file of the pod and the empty termination message of this attempt.
fn write_files(shared: &Shared, order: &Order, facts: &Facts) -> Result<Files, FileError> {
    use std::os::unix::fs::PermissionsExt;
    let dir = shared.config.pods_dir().join(PodId::of(&order.pod).uid);
    let hosts = dir.join("etc-hosts");
    let folder = dir.join("containers").join(&order.container.name);
    let message = folder.join(order.attempt.to_string());
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| FileError { path, source }
    };
    std::fs::create_dir_all(&folder).map_err(failed(&folder))?;
    // In place, not renamed: containers have the very file mounted.
    std::fs::write(&hosts, spec::hosts_file(&order.pod, &facts.pod_ips, &shared.config))
        .map_err(failed(&hosts))?;
    std::fs::write(&message, b"").map_err(failed(&message))?;
    // Whatever user the container runs as must be able to write it.
    std::fs::set_permissions(&message, PermissionsExt::from_mode(0o666)).map_err(failed(&message))?;
    Ok(Files { hosts, message })
}

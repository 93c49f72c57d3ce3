//! Stops one container: preStop hook within the grace, then the runtime's SIGTERM and SIGKILL. And reads what it left.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use weft_agent_runtime::Runtime;

use crate::events::Kind;
use crate::hooks;
use crate::logs;
use crate::observed::ContainerView;
use crate::pod::{self, PodId};
use crate::shared::Shared;
use weft_agent_runtime::chain;

/// A process is given at least this after its preStop hook has used up the grace.
const LEAST_GRACE: Duration = Duration::from_secs(2);
/// A termination message is cut here.
const MAX_MESSAGE: usize = 4096;
/// Logs that stand in for a message: the last so many lines, cut at half the bound (upstream).
const FALLBACK_LINES: usize = 80;
const FALLBACK_BYTES: usize = 2048;

/// What to stop.
pub(crate) struct Order {
    pub(crate) pod: Arc<Pod>,
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) why: String,
    pub(crate) pod_ip: String,
    /// The grace; may shrink while it runs.
    pub(crate) grace: watch::Receiver<Duration>,
}

/// Stops it. An error is logged, and found again by the next look at the container.
pub(crate) async fn kill(shared: Arc<Shared>, mut order: Order) {
    let grace = *order.grace.borrow_and_update();
    shared.events.container(&order.pod, &order.name, (Kind::Normal, "Killing"), order.why.clone());
    let begun = tokio::time::Instant::now();
    let hook = pod::find_container(&order.pod, &order.name)
        .and_then(|(c, _)| c.lifecycle.as_ref()?.pre_stop.clone());
    if let Some(hook) = hook {
        let run = hooks::run(&shared.runtime, (&order.pod, &order.name, &order.id), &hook, &order.pod_ip);
        let mut grace_changes = order.grace.clone();
        let limit = async {
            let mut limit = grace;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(begun + limit) => return,
                    Ok(()) = grace_changes.changed() => limit = limit.min(*grace_changes.borrow()),
                }
            }
        };
        tokio::select! {
            result = run => if let Err(error) = result {
                shared.events.container(&order.pod, &order.name, (Kind::Warning, "FailedPreStopHook"), "PreStopHook failed".to_owned());
                tracing::warn!(pod = %PodId::of(&order.pod), container = order.name, error = %chain(&error), "preStop hook failed");
            },
            () = limit => {}
        }
    }
    loop {
        let left =
            order.grace.borrow_and_update().saturating_sub(begun.elapsed()).max(LEAST_GRACE.min(grace));
        tokio::select! {
            stopped = shared.runtime.stop_container(&order.id, left) => {
                if let Err(error) = stopped {
                    tracing::warn!(pod = %PodId::of(&order.pod), container = order.name, error = %chain(&error), "cannot stop container");
                }
                return;
            }
            // Asked again with less patience: the call is repeated with the rest.
            Ok(()) = order.grace.changed() => {}
        }
    }
}

/// The container as it is now, with the message that it left if it has ended.
pub(crate) async fn look(runtime: &Arc<dyn Runtime>, id: &str) -> Option<ContainerView> {
    let mut view = ContainerView::from(&runtime.container(id).await.ok()?);
    if let Some(exit) = view.exit()
        && let Some((path, fallback)) = view.message_file.clone()
    {
        let failed = exit.code != 0;
        let text = read_message(&path).await;
        view.message = if text.is_empty() && fallback && failed {
            match runtime.log_path(id).await {
                Ok(log) => Some(logs::tail_text(&log, FALLBACK_LINES, FALLBACK_BYTES).await),
                Err(_) => None,
            }
        } else {
            Some(text)
        };
    }
    Some(view)
}

/// At most [`MAX_MESSAGE`] bytes; the file is the container's own, so it is neither trusted in size nor in kind.
async fn read_message(path: &std::path::Path) -> String {
    use tokio::io::AsyncReadExt;
    if !tokio::fs::symlink_metadata(path).await.is_ok_and(|m| m.is_file()) {
        return String::new();
    }
    let mut text = Vec::new();
    if let Ok(file) = tokio::fs::File::open(path).await {
        // What can't be read is no message.
        let _ = file.take(MAX_MESSAGE as u64).read_to_end(&mut text).await;
    }
    String::from_utf8_lossy(&text).into_owned()
}

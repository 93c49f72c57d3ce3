//! Keeps the written volumes of a running pod fresh: on changes of its objects, of the pod itself, and before tokens end.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::{Source, source, used, write};
use crate::clock;
use crate::objects::{Handle, Known};
use crate::pod::{self, PodId};
use crate::shared::Shared;
use crate::start;

/// A failed write is tried again after this.
const RETRY: Duration = Duration::from_secs(10);

/// Runs until dropped.
pub(crate) async fn run(shared: Arc<Shared>, mut pod: watch::Receiver<Arc<Pod>>, handles: Vec<Handle>) {
    let mut states: Vec<watch::Receiver<Known>> = handles.iter().map(Handle::changes).collect();
    // The volumes have just been written; this pass only learns when tokens are due.
    let first = pod.borrow_and_update().clone();
    let mut next = refresh(&shared, &first).await;
    loop {
        let due = async {
            match next {
                Some(at) => tokio::time::sleep(clock::until(at, clock::now())).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            changed = pod.changed() => if changed.is_err() { return },
            () = any_changed(&mut states) => {}
        }
        let now = pod.borrow_and_update().clone();
        next = refresh(&shared, &now).await;
    }
}

async fn any_changed(states: &mut [watch::Receiver<Known>]) {
    let mut changes: FuturesUnordered<_> = states.iter_mut().map(watch::Receiver::changed).collect();
    while let Some(change) = changes.next().await {
        if change.is_ok() {
            return;
        }
    }
    std::future::pending::<()>().await;
}

async fn refresh(shared: &Arc<Shared>, pod: &Pod) -> Option<Timestamp> {
    let facts = start::facts(shared, pod, None);
    let mut next: Option<Timestamp> = None;
    for volume in pod::spec(pod).volumes.iter().flatten().filter(|v| used(pod, &v.name)) {
        let Source::Written(written) = source(volume) else { continue };
        let rewritten = match written.folder(shared, pod, &volume.name) {
            Ok(dir) => write(shared, pod, volume, (&dir, &facts)).await,
            Err(error) => Err(error.to_string()),
        };
        let due = match rewritten {
            Ok(due) => due,
            Err(error) => {
                tracing::warn!(pod = %PodId::of(pod), volume = volume.name, error, "cannot refresh volume");
                Some(clock::after(clock::now(), RETRY))
            }
        };
        next = [next, due].into_iter().flatten().min();
    }
    next
}

//! Writes one pod's status to the API server: the newest only, the difference only, one request at a time.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::pod::PodId;
use crate::shared::Shared;
use crate::start::api_error;
use crate::status;

/// First delay after a failed write; doubles up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What the writer shall reach.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// The status to be seen; `None` before the first.
    pub(crate) status: Option<Arc<PodStatus>>,
    /// What the API has now, if somebody else wrote it since; see [`Seen`].
    pub(crate) seen: Option<Seen>,
    /// Then delete the pod object: nothing of it is left on this node.
    pub(crate) delete: bool,
}

/// A status as the source saw it. The node controller marks the pods of a silent node as not ready; when the node is
/// back, what this kubelet wrote before no longer stands and must be written again.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The pod's resource version, to tell another's write from an echo of our own.
    pub(crate) version: u64,
    /// The status at that version.
    pub(crate) status: Arc<PodStatus>,
}

impl Seen {
    /// `None` if the API server doesn't number its versions; then nothing can be told from an echo.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        Some(Self { version: version(pod)?, status: Arc::new(pod.status.clone()?) })
    }
}

/// What the API has by our own last write.
#[derive(Debug, Default)]
struct Written {
    status: Map<String, Value>,
    version: u64,
}

impl Written {
    /// Takes over what somebody else wrote after us.
    fn learn(&mut self, seen: &Seen) {
        if seen.version > self.version {
            *self = Self { status: as_object(&seen.status), version: seen.version };
        }
    }
}

/// Resource versions are numbers that grow (KEP-5504).
fn version(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_ref()?.parse().ok()
}

/// Follows `wanted` until the sender is gone or the pod is.
pub(crate) async fn run(
    shared: Arc<Shared>,
    id: PodId,
    known: Option<PodStatus>,
    mut wanted: watch::Receiver<Wanted>,
) {
    let api: Api<Pod> = Api::namespaced(shared.client.clone(), &id.namespace);
    let status = known.map(|status| as_object(&status)).unwrap_or_default();
    let mut written = Written { status, version: 0 };
    let mut retry = RETRY_FIRST;
    loop {
        let goal = wanted.borrow_and_update().clone();
        match reach(&api, &id, &goal, &mut written).await {
            Ok(Reached::Gone) => return,
            Ok(Reached::Done) => {
                retry = RETRY_FIRST;
                if wanted.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(pod = %id, error = api_error(&error), "cannot write pod status");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY_MAX);
                // A worker that is gone wants nothing any more.
                if wanted.has_changed().is_err() && !goal.delete {
                    return;
                }
            }
        }
    }
}

enum Reached {
    Done,
    Gone,
}

async fn reach(
    api: &Api<Pod>,
    id: &PodId,
    goal: &Wanted,
    written: &mut Written,
) -> Result<Reached, kube::Error> {
    if let Some(seen) = &goal.seen {
        written.learn(seen);
    }
    if let Some(status) = &goal.status {
        let target = as_object(status);
        if let Some(patch) = difference(&written.status, &target) {
            let body = json!({"metadata": {"uid": id.uid}, "status": patch});
            match api.patch_status(&id.name, &PatchParams::default(), &Patch::Strategic(body)).await {
                Ok(pod) => {
                    *written = Written { status: target, version: version(&pod).unwrap_or(written.version) };
                }
                Err(error) if is_gone(api, id, &error).await? => return Ok(Reached::Gone),
                Err(error) => return Err(error),
            }
        }
    }
    if goal.delete {
        let precondition = Preconditions { uid: Some(id.uid.clone()), resource_version: None };
        let params = DeleteParams::default().grace_period(0).preconditions(precondition);
        return match api.delete(&id.name, &params).await {
            Ok(_) => Ok(Reached::Gone),
            Err(error) if is_gone(api, id, &error).await? => Ok(Reached::Gone),
            Err(error) => Err(error),
        };
    }
    Ok(Reached::Done)
}

/// The object is not there, or is another one of the same name. A conflict may be either that or a lost race.
async fn is_gone(api: &Api<Pod>, id: &PodId, error: &kube::Error) -> Result<bool, kube::Error> {
    let kube::Error::Api(status) = error else { return Ok(false) };
    if status.code != 409 {
        return Ok(status.code == 404);
    }
    let found = api.get_opt(&id.name).await?;
    Ok(found.and_then(|pod| pod.metadata.uid).as_ref() != Some(&id.uid))
}

/// The status as JSON, without the conditions that others own: theirs are never written back.
fn as_object(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(mut map)) => {
            if let Some(Value::Array(conditions)) = map.get_mut("conditions") {
                conditions
                    .retain(|c| c["type"].as_str().is_some_and(|t| status::OWN_CONDITIONS.contains(&t)));
            }
            map
        }
        // A PodStatus always is an object; nothing known means everything is written.
        _ => Map::new(),
    }
}

/// A strategic merge patch from one status to the other; `None` if they are equal. Conditions are merged by type, so
/// that conditions of other writers survive; addresses that went away are removed by name.
fn difference(from: &Map<String, Value>, to: &Map<String, Value>) -> Option<Value> {
    let mut patch = Map::new();
    for (key, value) in to {
        if from.get(key) == Some(value) {
            continue;
        }
        let value = match key.as_str() {
            "conditions" => changed_items(from.get(key), value),
            "podIPs" | "hostIPs" => replaced_ips(from.get(key), value),
            _ => value.clone(),
        };
        patch.insert(key.clone(), value);
    }
    for key in from.keys().filter(|key| !to.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

fn items(list: Option<&Value>) -> &[Value] {
    list.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn changed_items(from: Option<&Value>, to: &Value) -> Value {
    let before = items(from);
    let mut changed = Vec::new();
    for item in items(Some(to)).iter().filter(|item| !before.contains(item)) {
        let mut item = item.clone();
        let old = before.iter().find(|b| b["type"] == item["type"]);
        // What is no longer said must be taken away by name.
        if let (Some(Value::Object(old)), Value::Object(new)) = (old, &mut item) {
            for key in old.keys() {
                new.entry(key.clone()).or_insert(Value::Null);
            }
        }
        changed.push(item);
    }
    Value::Array(changed)
}

fn replaced_ips(from: Option<&Value>, to: &Value) -> Value {
    let mut list = items(Some(to)).to_vec();
    let gone = items(from).iter().filter(|old| !items(Some(to)).iter().any(|new| new["ip"] == old["ip"]));
    list.extend(gone.map(|old| json!({"ip": old["ip"], "$patch": "delete"})));
    Value::Array(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn nothing_changed_is_no_patch() {
        let a = object(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}));
        assert_eq!(difference(&a, &a.clone()), None);
    }

    #[test]
    fn only_changed_fields_and_conditions_are_sent() {
        let a = object(json!({"phase": "Pending", "podIP": "1", "reason": "x", "conditions": [
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady"}, {"type": "Initialized", "status": "True"}]}));
        let b = object(json!({"phase": "Pending", "podIP": "2", "conditions": [
            {"type": "Ready", "status": "True"}, {"type": "Initialized", "status": "True"}]}));
        assert_eq!(
            difference(&a, &b).unwrap(),
            json!({"podIP": "2", "reason": null, "conditions": [{"type": "Ready", "status": "True", "reason": null}]})
        );
    }

    #[test]
    fn what_others_wrote_is_written_over_and_an_echo_is_not() {
        let status = |ready: &str| -> PodStatus {
            serde_json::from_value(json!({"conditions": [{"type": "Ready", "status": ready}]})).unwrap()
        };
        let seen = |version, ready| Seen { version, status: Arc::new(status(ready)) };
        let target = as_object(&status("True"));
        let mut written = Written { status: target.clone(), version: 7 };
        written.learn(&seen(6, "False"));
        assert_eq!(difference(&written.status, &target), None, "an older state is an echo");
        written.learn(&seen(8, "False"));
        let patch = difference(&written.status, &target).unwrap();
        assert_eq!(patch, json!({"conditions": [{"type": "Ready", "status": "True"}]}));
    }

    #[test]
    fn a_new_address_takes_the_old_one_away() {
        let a = object(json!({"podIPs": [{"ip": "1"}]}));
        let b = object(json!({"podIPs": [{"ip": "2"}]}));
        assert_eq!(
            difference(&a, &b).unwrap(),
            json!({"podIPs": [{"ip": "2"}, {"ip": "1", "$patch": "delete"}]})
        );
    }
}

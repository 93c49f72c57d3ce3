//! Owns deletion: preconditions, grace, finalizers, and what happens to dependents.

use super::create::{Extra, now};
use super::options::dry_run;
use super::update::{commit, is_finished};
use super::{Call, list, output, shape};
use crate::admission::{self, Operation, Review};
use crate::alloc;
use crate::api::{Api, object_key};
use crate::body::{Body, Response};
use crate::cache::{Item, json_with_revision, object_value_bytes};
use crate::identity::User;
use crate::reply;
use crate::resources::Resource;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::codec::FieldValidation;
use weft_control_api::field::{FieldError, FieldPath};
use weft_control_api::kinds::{Gvk, Kind};
use weft_control_api::status::Status;
use weft_control_store::Op;

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";
/// How often a deletion is tried anew after it lost a race.
const MAX_TRIES: usize = 16;

/// What becomes of an object's dependents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// They are kept.
    Orphan,
    /// They go later.
    Background,
    /// They go first.
    Foreground,
}

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeleteOptions {
    /// Seconds that a pod is given.
    pub(crate) grace_seconds: Option<i64>,
    /// The uid that the object must have.
    pub(crate) uid: Option<String>,
    /// The revision that the object must have.
    pub(crate) resource_version: Option<String>,
    /// What becomes of its dependents.
    pub(crate) propagation: Option<Propagation>,
    /// Do everything but write.
    pub(crate) dry_run: bool,
}

impl DeleteOptions {
    async fn of(call: &Call, body: Body) -> Result<Self, Status> {
        let body = call.read(body).await?;
        let options = if body.is_empty() {
            let text = |key| call.query.get(key).map(|v| json!(v));
            let number = |key| call.query.get(key).and_then(|v| v.parse::<i64>().ok()).map(|v| json!(v));
            json!({"gracePeriodSeconds": number("gracePeriodSeconds"),
                "propagationPolicy": text("propagationPolicy"), "dryRun": call.query.all("dryRun"),
                "orphanDependents": call.query.get("orphanDependents").map(|v| json!(v == "true"))})
        } else {
            decode(call, &body)?
        };
        Self::read(&options)
    }

    pub(crate) fn read(options: &Value) -> Result<Self, Status> {
        let propagation = match options["propagationPolicy"].as_str() {
            None => match options["orphanDependents"].as_bool() {
                None => None,
                Some(true) => Some(Propagation::Orphan),
                Some(false) => Some(Propagation::Background),
            },
            Some("Orphan") => Some(Propagation::Orphan),
            Some("Background") => Some(Propagation::Background),
            Some("Foreground") => Some(Propagation::Foreground),
            Some(other) => {
                let supported = ["Foreground", "Background", "Orphan"];
                let error =
                    FieldError::not_supported(&FieldPath::new("propagationPolicy"), other, &supported);
                let kind =
                    weft_control_api::status::GroupKind { group: "meta.k8s.io", kind: "DeleteOptions" };
                return Err(Status::invalid(kind, "", vec![error]));
            }
        };
        let text = |key: &str| options["preconditions"][key].as_str().map(str::to_owned);
        let dry = options["dryRun"].as_array().into_iter().flatten().filter_map(Value::as_str);
        Ok(Self {
            grace_seconds: options["gracePeriodSeconds"].as_i64(),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            propagation,
            dry_run: dry_run(dry)?,
        })
    }
}

/// Reads a body of DeleteOptions: of the core group, or of the resource's own, as old clients send it.
fn decode(call: &Call, body: &[u8]) -> Result<Value, Status> {
    let core = Gvk { group: "", version: "v1", kind: "DeleteOptions" };
    let validation = FieldValidation::Ignore;
    let kind = match call.decode_as(&core, body, validation) {
        Ok(decoded) => return Ok(decoded.object),
        Err(_other) => Gvk { group: call.kind.group, version: call.kind.version, kind: "DeleteOptions" },
    };
    call.decode_as(&kind, body, validation).map(|decoded| decoded.object)
}

/// How a deletion ended.
pub(crate) enum Deleted {
    /// The object is gone; its last state.
    Gone(Value),
    /// The object waits for its end; its JSON.
    Pending(Bytes),
}

/// Answers a DELETE of one object.
pub(super) async fn answer(call: &Call, body: Body) -> Result<Response, Status> {
    let shape = shape(call)?;
    let options = DeleteOptions::of(call, body).await?;
    let namespace = if call.kind.namespaced { call.info.namespace.as_str() } else { "" };
    match delete_object(&call.api, &call.user, call.kind, (namespace, &call.info.name), &options).await? {
        Deleted::Pending(json) => output::object(call, shape, StatusCode::OK, json),
        Deleted::Gone(object) if returns_object(call.kind) => {
            output::object(call, shape, StatusCode::OK, Bytes::from(object.to_string()))
        }
        Deleted::Gone(object) => {
            let uid = object["metadata"]["uid"].as_str().unwrap_or_default();
            Ok(reply::status(&Status::success(call.kind.group_resource(), &call.info.name, uid)))
        }
    }
}

/// Kinds whose deletion answers the object, as upstream.
fn returns_object(kind: &Kind) -> bool {
    kind.group.is_empty()
        && matches!(
            kind.plural,
            "pods"
                | "services"
                | "serviceaccounts"
                | "persistentvolumeclaims"
                | "podtemplates"
                | "resourcequotas"
                | "persistentvolumes"
        )
}

/// Answers a DELETE of many objects.
pub(super) async fn collection(call: &Call, body: Body) -> Result<Response, Status> {
    let options = DeleteOptions::of(call, body).await?;
    let items = list::selected(call).await?;
    let mut pieces = Vec::new();
    for item in &items {
        let key = (item.namespace(), item.name());
        match delete_object(&call.api, &call.user, call.kind, key, &options).await {
            Ok(_) => pieces.push(item.json()),
            // Somebody else was faster; that is what was asked for.
            Err(status) if status.code() == 404 => {}
            Err(status) => return Err(status),
        }
    }
    let metadata = json!({"resourceVersion": call.api.cache.revision().to_string()});
    Ok(reply::json_pieces(list::object_list(call, pieces, &metadata), call.gzip))
}

/// Deletes an object, or begins to.
pub(crate) async fn delete_object(
    api: &Arc<Api>,
    user: &User,
    kind: &'static Kind,
    (namespace, name): (&str, &str),
    options: &DeleteOptions,
) -> Result<Deleted, Status> {
    let resource =
        api.resources.by_plural(kind.group, kind.plural).ok_or_else(Status::method_not_allowed)?.clone();
    let key = object_key(namespace, name);
    let review = Review {
        api,
        user,
        operation: Operation::Delete,
        kind: resource.storage,
        subresource: "",
        namespace,
        name,
    };
    for _try in 0..MAX_TRIES {
        let item = api
            .fresh(&resource, &key)
            .await?
            .ok_or_else(|| Status::not_found(kind.group_resource(), name))?;
        let old = item.parse();
        check_preconditions(kind, name, options, &old)?;
        admission::validate(&review, None, Some(&old))?;
        let (plan, new) = plan(kind, &old, options);
        if let Some(deleted) = carry_out(api, &resource, &item, (plan, new), options.dry_run).await? {
            return Ok(deleted);
        }
        // With a precondition on the revision a lost race is final.
        if options.resource_version.is_some() {
            break;
        }
    }
    Err(Status::modified(kind.group_resource(), name))
}

async fn carry_out(
    api: &Api,
    resource: &Resource,
    item: &Item,
    (plan, new): (Plan, Value),
    dry_run: bool,
) -> Result<Option<Deleted>, Status> {
    let key = resource.store_key(&item.key);
    let value = object_value_bytes(&new);
    match plan {
        Plan::Nothing => Ok(Some(Deleted::Pending(item.json()))),
        Plan::Remove if dry_run => Ok(Some(Deleted::Gone(new))),
        Plan::Mark if dry_run => Ok(Some(Deleted::Pending(json_with_revision(&value, item.revision)))),
        Plan::Remove => {
            let mut extra = Extra::default();
            alloc::on_delete(api, resource.storage, &new, &mut extra);
            let done = commit(api, &key, item.revision, Op::Delete { key: key.clone() }, extra).await?;
            Ok(done.map(|_revision| Deleted::Gone(new)))
        }
        Plan::Mark => {
            let op = Op::Put { key: key.clone(), value: value.clone() };
            let done = commit(api, &key, item.revision, op, Extra::default()).await?;
            Ok(done.map(|revision| Deleted::Pending(json_with_revision(&value, revision))))
        }
    }
}

fn check_preconditions(kind: &Kind, name: &str, options: &DeleteOptions, old: &Value) -> Result<(), Status> {
    let rows =
        [(&options.uid, "uid", "UID"), (&options.resource_version, "resourceVersion", "ResourceVersion")];
    for (wanted, key, title) in rows {
        let found = old["metadata"][key].as_str().unwrap_or_default();
        if let Some(wanted) = wanted
            && wanted != found
        {
            let reason = format!(
                "Precondition failed: {title} in precondition: {wanted}, {title} in object meta: {found}"
            );
            return Err(Status::conflict(kind.group_resource(), name, &reason));
        }
    }
    Ok(())
}

/// What a deletion does to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// It is on its way already.
    Nothing,
    /// It gets a deletion timestamp or other finalizers, and waits.
    Mark,
    /// It goes at once.
    Remove,
}

/// Decides what a deletion does. Pure.
fn plan(kind: &Kind, old: &Value, options: &DeleteOptions) -> (Plan, Value) {
    let mut new = old.clone();
    let grace = if kind.group.is_empty() && kind.kind == "Pod" { pod_grace(old, options) } else { 0 };
    let finalizers_changed = set_propagation(&mut new, options.propagation);
    let marked = mark(&mut new, grace, options.grace_seconds);
    if kind.group.is_empty() && kind.kind == "Namespace" {
        new["status"]["phase"] = json!("Terminating");
    }
    if is_finished(&new) {
        return (Plan::Remove, new);
    }
    let plan = if marked || finalizers_changed { Plan::Mark } else { Plan::Nothing };
    (plan, new)
}

/// The seconds that a pod is given: none if nothing of it can be running.
fn pod_grace(pod: &Value, options: &DeleteOptions) -> i64 {
    let phase = pod["status"]["phase"].as_str().unwrap_or_default();
    let scheduled = pod["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    if !scheduled || matches!(phase, "Succeeded" | "Failed") {
        return 0;
    }
    let wanted = options.grace_seconds.or_else(|| pod["spec"]["terminationGracePeriodSeconds"].as_i64());
    match wanted.unwrap_or(30) {
        negative if negative < 0 => 1,
        seconds => seconds,
    }
}

/// Sets the deletion timestamp, or brings it forward; whether anything changed.
fn mark(new: &mut Value, grace: i64, asked: Option<i64>) -> bool {
    let metadata = &mut new["metadata"];
    let Some(since) = metadata["deletionTimestamp"].as_str() else {
        metadata["deletionTimestamp"] = json!(after(&now(), grace));
        metadata["deletionGracePeriodSeconds"] = json!(grace);
        if let Some(generation) = metadata["generation"].as_i64().filter(|g| *g > 0) {
            metadata["generation"] = json!(generation + 1);
        }
        return true;
    };
    let left = metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    // Grace is only ever shortened, and only by somebody who says so or where nothing runs any more.
    if grace >= left || (asked.is_none() && grace > 0) {
        return false;
    }
    let sooner = after(since, grace - left);
    metadata["deletionTimestamp"] = json!(sooner);
    metadata["deletionGracePeriodSeconds"] = json!(grace);
    true
}

fn after(time: &str, seconds: i64) -> String {
    let time: jiff::Timestamp = time.parse().unwrap_or_else(|_unreadable| jiff::Timestamp::now());
    let later = time.checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(time);
    later.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Sets the finalizers that stand for what becomes of dependents; whether they changed.
fn set_propagation(new: &mut Value, propagation: Option<Propagation>) -> bool {
    let Some(propagation) = propagation else { return false };
    let before: Vec<String> = new["metadata"]["finalizers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|f| f.as_str().map(str::to_owned))
        .collect();
    let mut after: Vec<String> =
        before.iter().filter(|f| *f != ORPHAN && *f != FOREGROUND).cloned().collect();
    match propagation {
        Propagation::Orphan => after.push(ORPHAN.to_owned()),
        Propagation::Foreground => after.push(FOREGROUND.to_owned()),
        Propagation::Background => {}
    }
    if before == after {
        return false;
    }
    if after.is_empty() {
        if let Some(metadata) = new["metadata"].as_object_mut() {
            metadata.remove("finalizers");
        }
    } else {
        new["metadata"]["finalizers"] = json!(after);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_control_api::kinds;

    fn pod(extra: Value) -> Value {
        let mut pod =
            json!({"metadata": {"name": "a", "generation": 1}, "spec": {"nodeName": "n"}, "status": {}});
        for (key, value) in extra.as_object().unwrap() {
            pod[key] = value.clone();
        }
        pod
    }

    fn kind() -> &'static Kind {
        kinds::find("", "v1", "pods").unwrap()
    }

    #[test]
    fn a_running_pod_gets_its_grace_and_a_waiting_one_none() {
        let (plan_, new) = plan(kind(), &pod(json!({})), &DeleteOptions::default());
        assert_eq!(plan_, Plan::Mark);
        assert_eq!(new["metadata"]["deletionGracePeriodSeconds"], 30);
        assert_eq!(new["metadata"]["generation"], 2);
        let (plan_, again) = plan(kind(), &new, &DeleteOptions::default());
        assert_eq!((plan_, &again), (Plan::Nothing, &new));
        let now = DeleteOptions { grace_seconds: Some(0), ..DeleteOptions::default() };
        assert_eq!(plan(kind(), &new, &now).0, Plan::Remove);
        let sooner = DeleteOptions { grace_seconds: Some(5), ..DeleteOptions::default() };
        assert_eq!(plan(kind(), &new, &sooner).1["metadata"]["deletionGracePeriodSeconds"], 5);
        let unscheduled = pod(json!({"spec": {}}));
        assert_eq!(plan(kind(), &unscheduled, &DeleteOptions::default()).0, Plan::Remove);
        let ended = pod(json!({"status": {"phase": "Succeeded"}}));
        assert_eq!(plan(kind(), &ended, &DeleteOptions::default()).0, Plan::Remove);
    }

    #[test]
    fn dependents_decide_by_finalizer() {
        let kind = kinds::find("apps", "v1", "deployments").unwrap();
        let object = json!({"metadata": {"name": "a"}});
        let with = |propagation| DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        assert_eq!(plan(kind, &object, &with(Propagation::Background)).0, Plan::Remove);
        let (plan_, new) = plan(kind, &object, &with(Propagation::Foreground));
        assert_eq!((plan_, &new["metadata"]["finalizers"]), (Plan::Mark, &json!(["foregroundDeletion"])));
        let (plan_, new) = plan(kind, &new, &with(Propagation::Orphan));
        assert_eq!((plan_, &new["metadata"]["finalizers"]), (Plan::Mark, &json!(["orphan"])));
        assert_eq!(plan(kind, &new, &DeleteOptions::default()).0, Plan::Nothing);
    }
}

//! Owns changes of objects: replacing, patching, and every change that the server makes itself.

use super::create::{Extra, NewObject, create};
use super::options::WriteOptions;
use super::{Call, Written, convert, output, patch_type, shape};
use crate::admission::{self, Operation, Review};
use crate::alloc;
use crate::api::{Api, object_key, store_failure};
use crate::body::{Body, Response};
use crate::cache::{Item, json_with_revision, object_value_bytes};
use crate::identity::User;
use crate::reply;
use crate::resources::Resource;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::kinds::Kind;
use weft_control_api::status::Status;
use weft_control_api::{patch as patching, strategy};
use weft_control_store::{Condition, Op, TxnOutcome};

/// How often a change without a precondition is made anew after it lost a race.
const MAX_TRIES: usize = 16;

/// Which object is changed, and how.
pub(crate) struct Change<'a> {
    /// The kind that the change is said in.
    pub(crate) kind: &'static Kind,
    /// Its namespace; empty at cluster scope.
    pub(crate) namespace: &'a str,
    /// Its name.
    pub(crate) name: &'a str,
    /// The subresource through which it is changed; empty for the object itself.
    pub(crate) subresource: &'a str,
    /// Do everything but write.
    pub(crate) dry_run: bool,
}

/// Kinds that a PUT creates if they aren't there, as upstream.
const CREATE_ON_UPDATE: [&str; 9] = [
    "endpoints",
    "events",
    "leases",
    "services",
    "limitranges",
    "roles",
    "rolebindings",
    "clusterroles",
    "clusterrolebindings",
];

/// Answers a PUT.
pub(super) async fn put(call: &Call, body: Body) -> Result<Response, Status> {
    let shape = shape(call)?;
    let options = WriteOptions::of(&call.query)?;
    let body = call.read(body).await?;
    let decoded = call.decode(&body, &options)?;
    let mut object = decoded.object;
    strategy::default(call.kind, &mut object);
    if object["metadata"]["name"].as_str().unwrap_or_default().is_empty() {
        return Err(Status::bad_request("name must be provided"));
    }
    let outcome =
        update_object(&call.api, &call.user, &change(call, &options), |_old| Ok(object.clone())).await;
    let written = match outcome {
        Err(status) if status.code() == 404 && creates_on_update(call) => {
            let new = NewObject {
                kind: call.kind,
                namespace: if call.kind.namespaced { &call.info.namespace } else { "" },
                object,
                dry_run: options.dry_run,
            };
            create(&call.api, &call.user, new).await?
        }
        outcome => outcome?,
    };
    respond(call, shape, written, decoded.warnings)
}

fn creates_on_update(call: &Call) -> bool {
    call.info.subresource.is_empty() && CREATE_ON_UPDATE.contains(&call.kind.plural)
}

/// Answers a PATCH.
pub(super) async fn patch(call: &Call, body: Body) -> Result<Response, Status> {
    let shape = shape(call)?;
    let options = WriteOptions::of(&call.query)?;
    let patch_type = patch_type(call.content_type())?;
    let body = call.read(body).await?;
    let mut warnings = Vec::new();
    let written = update_object(&call.api, &call.user, &change(call, &options), |old| {
        let decoded =
            patching::apply_and_decode(call.kind, patch_type, old, &body, options.field_validation)?;
        warnings = decoded.warnings;
        let mut object = decoded.object;
        strategy::default(call.kind, &mut object);
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if name != call.info.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                call.info.name
            )));
        }
        Ok(object)
    })
    .await?;
    respond(call, shape, written, warnings)
}

fn change<'a>(call: &'a Call, options: &WriteOptions) -> Change<'a> {
    Change {
        kind: call.kind,
        namespace: if call.kind.namespaced { &call.info.namespace } else { "" },
        name: &call.info.name,
        subresource: &call.info.subresource,
        dry_run: options.dry_run,
    }
}

fn respond(
    call: &Call,
    shape: crate::accept::Shape,
    written: Written,
    mut warnings: Vec<String>,
) -> Result<Response, Status> {
    warnings.extend(written.warnings);
    let code = if written.created { StatusCode::CREATED } else { StatusCode::OK };
    let mut response = output::object(call, shape, code, written.json)?;
    reply::warn(response.headers_mut(), &warnings);
    Ok(response)
}

/// Changes an object: `transform` is given the present state and makes the wanted one. It is called anew when
/// somebody else was faster, unless the wanted state names a `resourceVersion` that isn't the present one's.
pub(crate) async fn update_object(
    api: &Arc<Api>,
    user: &User,
    change: &Change<'_>,
    mut transform: impl FnMut(&Value) -> Result<Value, Status>,
) -> Result<Written, Status> {
    let kind = change.kind;
    let resource =
        api.resources.by_plural(kind.group, kind.plural).ok_or_else(Status::method_not_allowed)?.clone();
    let key = object_key(change.namespace, change.name);
    for _try in 0..MAX_TRIES {
        let item = api
            .fresh(&resource, &key)
            .await?
            .ok_or_else(|| Status::not_found(kind.group_resource(), change.name))?;
        let old = item.parse();
        let mut seen = old.clone();
        convert::object(&mut seen, resource.storage, kind);
        let mut new = transform(&seen)?;
        convert::object(&mut new, kind, resource.storage);
        check_preconditions(&resource, change.name, &new, &old)?;
        keep_system_metadata(&mut new, &old);
        let attempt = Attempt { api, user, change, resource: &resource, item: &item, old: &old };
        if let Some(written) = attempt.finish(new).await? {
            return Ok(written);
        }
    }
    Err(Status::modified(kind.group_resource(), change.name))
}

fn check_preconditions(resource: &Resource, name: &str, new: &Value, old: &Value) -> Result<(), Status> {
    let text = |object: &Value, key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
    let (wanted, found) = (text(new, "uid"), text(old, "uid"));
    if !wanted.is_empty() && wanted != found {
        let reason =
            format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}");
        return Err(Status::conflict(resource.storage.group_resource(), name, &reason));
    }
    let wanted = text(new, "resourceVersion");
    if !wanted.is_empty() && wanted != "0" && wanted != text(old, "resourceVersion") {
        return Err(Status::modified(resource.storage.group_resource(), name));
    }
    Ok(())
}

/// What clients can't change about an object's metadata.
fn keep_system_metadata(new: &mut Value, old: &Value) {
    if !new["metadata"].is_object() {
        new["metadata"] = json!({});
    }
    let Some(metadata) = new["metadata"].as_object_mut() else { return };
    for key in ["managedFields", "selfLink"] {
        metadata.remove(key);
    }
    for key in [
        "name",
        "namespace",
        "generateName",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
    ] {
        match old["metadata"].get(key) {
            Some(value) => metadata.insert(key.to_owned(), value.clone()),
            None => metadata.remove(key),
        };
    }
}

/// One try to change an object.
struct Attempt<'a> {
    api: &'a Arc<Api>,
    user: &'a User,
    change: &'a Change<'a>,
    resource: &'a Resource,
    item: &'a Item,
    old: &'a Value,
}

impl Attempt<'_> {
    /// Admits, validates and writes; none if somebody else was faster.
    async fn finish(&self, mut new: Value) -> Result<Option<Written>, Status> {
        let Change { namespace, name, subresource, .. } = *self.change;
        let storage = self.resource.storage;
        let via = (!subresource.is_empty()).then_some(subresource);
        let review = Review {
            api: self.api,
            user: self.user,
            operation: Operation::Update,
            kind: storage,
            subresource,
            namespace,
            name,
        };
        admission::mutate(&review, &mut new, Some(self.old))?;
        strategy::prepare_update(storage, via, &mut new, self.old);
        let mut extra = Extra::default();
        if via.is_none() {
            alloc::on_update(self.api, storage, &mut new, self.old, &mut extra).await?;
        }
        let errors = strategy::validate_update(storage, via, &new, self.old);
        if !errors.is_empty() {
            return Err(Status::invalid(storage.group_kind(), name, errors));
        }
        admission::validate(&review, Some(&new), Some(self.old))?;
        let warnings = if via.is_none() { strategy::warnings(storage, &new) } else { Vec::new() };
        let written = |json: Bytes| Some(Written { json, created: false, warnings: warnings.clone() });
        let value = object_value_bytes(&new);
        let done = is_finished(&new);
        if !done && value == object_value_bytes(self.old) {
            return Ok(written(self.item.json()));
        }
        if self.change.dry_run {
            return Ok(written(json_with_revision(&value, self.item.revision)));
        }
        let key = self.resource.store_key(&self.item.key);
        let op = if done {
            alloc::on_delete(self.api, storage, &new, &mut extra);
            Op::Delete { key: key.clone() }
        } else {
            Op::Put { key: key.clone(), value: value.clone() }
        };
        let revision = commit(self.api, &key, self.item.revision, op, extra).await?;
        Ok(revision.and_then(|revision| written(json_with_revision(&value, revision))))
    }
}

/// Commits a change of an object that must still have `seen` as its revision; none if it hasn't.
pub(super) async fn commit(
    api: &Api,
    key: &str,
    seen: u64,
    op: Op,
    extra: Extra,
) -> Result<Option<u64>, Status> {
    let mut conditions = vec![Condition::ModRevision(key.to_owned(), weft_control_store::Revision(seen))];
    conditions.extend(extra.conditions);
    let mut ops = vec![op];
    ops.extend(extra.ops);
    match api.store.txn(conditions, ops).await.map_err(store_failure)? {
        TxnOutcome::Committed(revision) => Ok(Some(revision.0)),
        TxnOutcome::Conflict(_) => Ok(None),
    }
}

/// Whether a deletion that waited has nothing left to wait for.
pub(super) fn is_finished(object: &Value) -> bool {
    let metadata = &object["metadata"];
    let none = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
    metadata["deletionTimestamp"].is_string()
        && metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && none(&metadata["finalizers"])
        && (object["kind"] != "Namespace" || none(&object["spec"]["finalizers"]))
}

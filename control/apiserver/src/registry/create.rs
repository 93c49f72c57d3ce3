//! Owns the creation of objects.

use super::{Written, convert};
use crate::admission::{self, Operation, Review};
use crate::alloc;
use crate::api::{Api, object_key, store_failure};
use crate::cache::{json_with_revision, object_value_bytes};
use crate::identity::User;
use rand::RngExt;
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::kinds::Kind;
use weft_control_api::status::Status;
use weft_control_api::strategy;
use weft_control_store::{Condition, Op, Revision, TxnOutcome};

/// Random characters that `generateName` gets: no vowels and no digits that look like letters, as upstream.
const NAME_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const NAME_SUFFIX: usize = 5;
const MAX_NAME_BASE: usize = 63 - NAME_SUFFIX;
/// Tries to find a free name, as upstream.
const MAX_NAMES: usize = 8;
/// Tries to write an object whose address, port or namespace others change at the same time. Each lost race means that
/// somebody else won theirs.
const MAX_TRIES: usize = 64;

/// What is to be created.
pub(crate) struct NewObject<'a> {
    /// The kind as the request names it.
    pub(crate) kind: &'static Kind,
    /// The namespace; empty at cluster scope.
    pub(crate) namespace: &'a str,
    /// The decoded object.
    pub(crate) object: Value,
    /// Do everything but write.
    pub(crate) dry_run: bool,
}

/// What else a creation or update writes and demands, atomically with the object itself.
#[derive(Default)]
pub(crate) struct Extra {
    /// Further conditions.
    pub(crate) conditions: Vec<Condition>,
    /// Further writes.
    pub(crate) ops: Vec<Op>,
}

/// A random suffix for a generated name.
pub(crate) fn random_suffix() -> String {
    let mut random = rand::rng();
    (0..NAME_SUFFIX).map(|_| char::from(NAME_ALPHABET[random.random_range(0..NAME_ALPHABET.len())])).collect()
}

/// The present as objects carry it.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Creates an object.
pub(crate) async fn create(api: &Arc<Api>, user: &User, new: NewObject<'_>) -> Result<Written, Status> {
    let NewObject { kind, namespace, mut object, dry_run } = new;
    let resource =
        api.resources.by_plural(kind.group, kind.plural).ok_or_else(Status::method_not_allowed)?.clone();
    let storage = resource.storage;
    strategy::default(kind, &mut object);
    convert::object(&mut object, kind, storage);
    fill_metadata(storage, namespace, &mut object)?;
    let user_extra = if user.extra.is_empty() { Value::Null } else { json!(user.extra) };
    let generated = object["metadata"]["name"].as_str().unwrap_or_default().is_empty()
        && object["metadata"]["generateName"].as_str().is_some_and(|base| !base.is_empty());
    let mut names = 0;
    for _try in 0..MAX_TRIES {
        let mut object = object.clone();
        if generated {
            generate_name(&mut object);
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let guard = admission::namespace_open(api, storage, namespace, &name).await?;
        let review = Review {
            api,
            user,
            operation: Operation::Create,
            kind: storage,
            subresource: "",
            namespace,
            name: &name,
        };
        admission::await_account(api, storage, namespace, &object).await;
        admission::mutate(&review, &mut object, None)?;
        strategy::prepare_create(storage, &mut object, &context(user, &user_extra));
        let mut extra = Extra { conditions: guard, ops: Vec::new() };
        alloc::on_create(api, storage, &mut object, &mut extra).await?;
        let errors = strategy::validate_create(storage, &object);
        if !errors.is_empty() {
            return Err(Status::invalid(storage.group_kind(), &name, errors));
        }
        admission::validate(&review, Some(&object), None)?;
        let warnings = strategy::warnings(storage, &object);
        let value = object_value_bytes(&object);
        if dry_run {
            let taken = api.fresh(&resource, &object_key(namespace, &name)).await?.is_some();
            if taken {
                return Err(Status::already_exists(storage.group_resource(), &name));
            }
            return Ok(Written { json: value, created: true, warnings });
        }
        let store_key = resource.store_key(&object_key(namespace, &name));
        match commit_new(api, &store_key, value, extra).await? {
            Outcome::Done(json) => return Ok(Written { json, created: true, warnings }),
            Outcome::Taken if !generated => {
                return Err(Status::already_exists(storage.group_resource(), &name));
            }
            Outcome::Taken => {
                names += 1;
                if names >= MAX_NAMES {
                    let base = object["metadata"]["generateName"].as_str().unwrap_or_default();
                    return Err(Status::generate_name_conflict(storage.group_resource(), base));
                }
            }
            Outcome::Raced => {}
        }
    }
    Err(Status::server_timeout(storage.group_resource(), "create", 1))
}

enum Outcome {
    Done(bytes::Bytes),
    /// The name is taken.
    Taken,
    /// Something else that the transaction demanded didn't hold.
    Raced,
}

async fn commit_new(
    api: &Api,
    store_key: &str,
    value: bytes::Bytes,
    extra: Extra,
) -> Result<Outcome, Status> {
    let mut conditions = vec![Condition::Absent(store_key.to_owned())];
    conditions.extend(extra.conditions);
    let mut ops = vec![Op::Put { key: store_key.to_owned(), value: value.clone() }];
    ops.extend(extra.ops);
    match api.store.txn(conditions, ops).await.map_err(store_failure)? {
        TxnOutcome::Committed(Revision(revision)) => Ok(Outcome::Done(json_with_revision(&value, revision))),
        TxnOutcome::Conflict(found) if found.first().is_some_and(Option::is_some) => Ok(Outcome::Taken),
        TxnOutcome::Conflict(_) => {
            // Whatever was in the way: the next try must see it.
            api.freshen().await?;
            Ok(Outcome::Raced)
        }
    }
}

fn context<'a>(user: &'a User, extra: &'a Value) -> strategy::Context<'a> {
    strategy::Context {
        username: &user.name,
        uid: &user.uid,
        groups: &user.groups,
        extra,
        now: jiff::Timestamp::now(),
    }
}

fn generate_name(object: &mut Value) {
    let base = object["metadata"]["generateName"].as_str().unwrap_or_default();
    let base: String = base.chars().take(MAX_NAME_BASE).collect();
    object["metadata"]["name"] = json!(format!("{base}{}", random_suffix()));
}

/// Sets what the server alone decides about a new object.
fn fill_metadata(kind: &Kind, namespace: &str, object: &mut Value) -> Result<(), Status> {
    let metadata = &mut object["metadata"];
    if !metadata.is_object() {
        *metadata = json!({});
    }
    if metadata["resourceVersion"].as_str().is_some_and(|version| !version.is_empty()) {
        return Err(Status::failure(500, "", "resourceVersion should not be set on objects to be created"));
    }
    if let Some(fields) = metadata.as_object_mut() {
        for key in [
            "resourceVersion",
            "selfLink",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "managedFields",
            "generation",
        ] {
            fields.remove(key);
        }
    }
    metadata["uid"] = json!(uuid::Uuid::new_v4().to_string());
    metadata["creationTimestamp"] = json!(now());
    if kind.namespaced {
        metadata["namespace"] = json!(namespace);
    } else if let Some(fields) = metadata.as_object_mut() {
        fields.remove("namespace");
    }
    Ok(())
}

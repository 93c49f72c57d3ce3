//! Owns adoption and release: which of a namespace's objects belong to an owner by controller reference and
//! selector, and the patches that make it so.

use crate::error::{Doing as _, SyncError};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams};
use kube::core::{NamespaceResourceScope, Selector, SelectorExt};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::sync::Arc;
use weft_control_client::found;

/// What becomes of a candidate.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Claim {
    /// It is the owner's.
    Owned,
    /// It is nobody's and matches: to be adopted.
    Adopt,
    /// It is the owner's, but no longer matches: to be released.
    Release,
    /// Not the owner's business.
    Ignore,
}

/// Compiles a selector. `None` for one that selects nothing or can't be parsed (validation keeps such out).
pub(crate) fn compile(selector: &LabelSelector) -> Option<Selector> {
    Selector::try_from(selector.clone()).ok()
}

/// Whether a selector matches an object's labels.
pub(crate) fn matches(selector: &Selector, meta: &ObjectMeta) -> bool {
    match &meta.labels {
        Some(labels) => selector.matches(labels),
        None => selector.matches(&std::collections::BTreeMap::new()),
    }
}

/// Decides about one object, as upstream's `ClaimObject`.
pub(crate) fn decide(owner: &ObjectMeta, selector: &Selector, object: &ObjectMeta) -> Claim {
    let owner_deleting = owner.deletion_timestamp.is_some();
    match weft_control_client::controller_of(object) {
        Some(controller) if Some(controller.uid.as_str()) != owner.uid.as_deref() => Claim::Ignore,
        Some(_) if matches(selector, object) => Claim::Owned,
        Some(_) if owner_deleting => Claim::Ignore,
        Some(_) => Claim::Release,
        None if owner_deleting || !matches(selector, object) => Claim::Ignore,
        None if object.deletion_timestamp.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// The objects that are the owner's now, those to adopt, and those to release.
pub(crate) struct Claims<K> {
    pub(crate) owned: Vec<Arc<K>>,
    pub(crate) adopt: Vec<Arc<K>>,
    pub(crate) release: Vec<Arc<K>>,
}

impl<K> Claims<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    /// Releases and adopts. Answers what is the owner's now; what was adopted has the resource version that the next patch must name.
    pub(crate) async fn carry_out<O>(
        self,
        client: &Client,
        owner: &O,
        reference: &OwnerReference,
    ) -> Result<Vec<Arc<K>>, SyncError>
    where
        O: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
    {
        let namespace = owner.namespace().unwrap_or_default();
        let api: Api<K> = Api::namespaced(client.clone(), &namespace);
        for object in &self.release {
            let patch = Patch::Strategic(release(&reference.uid, object.meta()));
            let released = api.patch(&object.name_any(), &PatchParams::default(), &patch).await;
            found(released).doing("release", named(object.as_ref()))?;
        }
        let mut owned = self.owned;
        if !self.adopt.is_empty() && still_there(client, owner).await? {
            for object in &self.adopt {
                let patch = Patch::Strategic(adoption(reference, object.meta()));
                let adopted = api.patch(&object.name_any(), &PatchParams::default(), &patch).await;
                owned.extend(found(adopted).doing("adopt", named(object.as_ref()))?.map(Arc::new));
            }
        }
        Ok(owned)
    }
}

/// Asks the API itself, since a stale cache must not let a deleted owner adopt.
async fn still_there<O>(client: &Client, owner: &O) -> Result<bool, SyncError>
where
    O: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<O> = Api::namespaced(client.clone(), &owner.namespace().unwrap_or_default());
    let fresh = found(api.get(&owner.name_any()).await).doing("get", named(owner))?;
    Ok(fresh.is_some_and(|f| f.uid() == owner.uid() && f.meta().deletion_timestamp.is_none()))
}

fn named<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{} {}", K::kind(&()), object.name_any())
}

/// Sorts candidates.
pub(crate) fn sort<K: Resource>(
    owner: &ObjectMeta,
    selector: &Selector,
    candidates: impl IntoIterator<Item = Arc<K>>,
) -> Claims<K> {
    let mut claims = Claims { owned: vec![], adopt: vec![], release: vec![] };
    for object in candidates {
        match decide(owner, selector, object.meta()) {
            Claim::Owned => claims.owned.push(object),
            Claim::Adopt => claims.adopt.push(object),
            Claim::Release => claims.release.push(object),
            Claim::Ignore => {}
        }
    }
    claims
}

/// The strategic merge patch that adds the owner's controller reference; the uid guards against a namesake.
pub(crate) fn adoption(owner: &OwnerReference, object: &ObjectMeta) -> Value {
    json!({"metadata": {"uid": object.uid, "ownerReferences": [owner]}})
}

/// The strategic merge patch that takes the owner's reference away.
pub(crate) fn release(owner_uid: &str, object: &ObjectMeta) -> Value {
    json!({"metadata": {"uid": object.uid, "ownerReferences": [{"$patch": "delete", "uid": owner_uid}]}})
}

/// The index value under which informers keep an object that may be claimed: its controller's uid, or the orphans
/// of its namespace.
pub(crate) fn index<K: Resource>(object: &K) -> Option<String> {
    let meta = object.meta();
    Some(match weft_control_client::controller_of(meta) {
        Some(controller) => controller.uid.clone(),
        None => orphans(meta.namespace.as_deref().unwrap_or_default()),
    })
}

/// The index value of a namespace's orphans.
pub(crate) fn orphans(namespace: &str) -> String {
    format!("orphans/{namespace}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn meta(uid: &str, label: &str, owner: Option<&str>, deleting: bool) -> ObjectMeta {
        let reference = |uid: &str| OwnerReference {
            uid: uid.into(),
            controller: Some(true),
            ..OwnerReference::default()
        };
        ObjectMeta {
            uid: Some(uid.into()),
            labels: Some([("app".to_owned(), label.to_owned())].into()),
            owner_references: owner.map(|uid| vec![reference(uid)]),
            deletion_timestamp: deleting.then_some(Time(jiff::Timestamp::UNIX_EPOCH)),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn adopts_matching_orphans_and_releases_strays() {
        let selector: Selector = [("app", "web")].into_iter().collect();
        let rows = [
            ("web", Some("me"), false, false, Claim::Owned),
            ("web", Some("me"), true, false, Claim::Owned),
            ("db", Some("me"), false, false, Claim::Release),
            ("web", Some("you"), false, false, Claim::Ignore),
            ("web", None, false, false, Claim::Adopt),
            ("web", None, true, false, Claim::Ignore),
            ("db", None, false, false, Claim::Ignore),
            ("web", None, false, true, Claim::Ignore),
            ("db", Some("me"), false, true, Claim::Ignore),
        ];
        for (label, owner, deleting, owner_deleting, expected) in rows {
            let decided =
                decide(&meta("me", "", None, owner_deleting), &selector, &meta("x", label, owner, deleting));
            assert_eq!(decided, expected, "{label} {owner:?} {deleting} {owner_deleting}");
        }
    }
}

//! Discovery: what the API serves, in the documents of every generation of clients.
//!
//! Each function takes the kinds that are served, in discovery order: groups by priority, preferred version first.
use serde_json::{Map, Value, json};

use crate::kinds::{Gvk, Kind, Subresource};

/// Which form of the aggregated document a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregated {
    /// `apidiscovery.k8s.io/v2`.
    V2,
    /// `apidiscovery.k8s.io/v2beta1`.
    V2Beta1,
}

impl Aggregated {
    /// Reads one media type of an `Accept` header, such as
    /// `application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList`.
    pub fn from_media_type(media_type: &str) -> Option<Self> {
        let mut parts = media_type.split(';').map(str::trim);
        if parts.next() != Some("application/json") {
            return None;
        }
        let parameters: Vec<&str> = parts.collect();
        let has = |parameter: &str| parameters.contains(&parameter);
        if !has("g=apidiscovery.k8s.io") || !has("as=APIGroupDiscoveryList") {
            return None;
        }
        match (has("v=v2"), has("v=v2beta1")) {
            (true, _) => Some(Self::V2),
            (false, true) => Some(Self::V2Beta1),
            (false, false) => None,
        }
    }

    /// The `Content-Type` of the document.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::V2 => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
            Self::V2Beta1 => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        }
    }

    fn api_version(self) -> &'static str {
        match self {
            Self::V2 => "apidiscovery.k8s.io/v2",
            Self::V2Beta1 => "apidiscovery.k8s.io/v2beta1",
        }
    }
}

/// `/api`: the versions of the core group. `server_address` is host and port.
pub fn core_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

/// `/apis`: every named group.
pub fn group_list<'k>(kinds: impl IntoIterator<Item = &'k Kind>) -> Value {
    let groups = by_group(kinds);
    let groups: Vec<Value> = groups
        .iter()
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, versions)| Value::Object(group_body(name, versions)))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `/apis/<group>`.
pub fn group<'k>(kinds: impl IntoIterator<Item = &'k Kind>, name: &str) -> Option<Value> {
    let groups = by_group(kinds.into_iter().filter(|kind| kind.group == name));
    let (name, versions) = groups.first().filter(|(name, _)| !name.is_empty())?;
    let mut body = group_body(name, versions);
    body.insert("kind".to_owned(), "APIGroup".into());
    body.insert("apiVersion".to_owned(), "v1".into());
    Some(Value::Object(body))
}

/// `/api/v1` and `/apis/<group>/<version>`.
pub fn resource_list<'k>(
    kinds: impl IntoIterator<Item = &'k Kind>,
    group: &str,
    version: &str,
) -> Option<Value> {
    let mut resources = Vec::new();
    for kind in kinds.into_iter().filter(|kind| kind.group == group && kind.version == version) {
        resources.push(resource(kind));
        resources.extend(kind.subresources.iter().map(|sub| subresource(kind, sub)));
    }
    if resources.is_empty() {
        return None;
    }
    let group_version = Gvk { group, version, kind: "" }.api_version();
    let mut list = json!({"kind": "APIResourceList", "groupVersion": group_version, "resources": resources});
    if !group.is_empty() {
        list["apiVersion"] = "v1".into();
    }
    Some(list)
}

/// `/api` (of the core group) or `/apis` (of all others) in one document with all resources.
pub fn aggregated<'k>(kinds: impl IntoIterator<Item = &'k Kind>, core: bool, form: Aggregated) -> Value {
    let groups = by_group(kinds.into_iter().filter(|kind| kind.group.is_empty() == core));
    let items: Vec<Value> = groups
        .iter()
        .map(|(name, versions)| {
            let metadata = if name.is_empty() { json!({}) } else { json!({"name": name}) };
            let versions: Vec<Value> = versions
                .iter()
                .map(|(version, kinds)| {
                    let resources: Vec<Value> = kinds.iter().map(|kind| aggregated_resource(kind)).collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": form.api_version(),
        "metadata": {},
        "items": items,
    })
}

type Versions<'k> = Vec<(&'k str, Vec<&'k Kind>)>;

/// Groups and their versions in order of appearance.
fn by_group<'k>(kinds: impl IntoIterator<Item = &'k Kind>) -> Vec<(&'k str, Versions<'k>)> {
    let mut groups: Vec<(&str, Versions<'k>)> = Vec::new();
    for kind in kinds {
        let versions = match groups.iter_mut().position(|(name, _)| *name == kind.group) {
            Some(at) => &mut groups[at].1,
            None => {
                groups.push((kind.group, Vec::new()));
                let last = groups.len() - 1;
                &mut groups[last].1
            }
        };
        match versions.iter_mut().find(|(version, _)| *version == kind.version) {
            Some((_, kinds)) => kinds.push(kind),
            None => versions.push((kind.version, vec![kind])),
        }
    }
    groups
}

fn group_body(name: &str, versions: &Versions<'_>) -> Map<String, Value> {
    let named = |version: &str| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    let versions: Vec<Value> = versions.iter().map(|(version, _)| named(version)).collect();
    let mut body = Map::new();
    body.insert("name".to_owned(), name.into());
    body.insert("preferredVersion".to_owned(), versions.first().cloned().unwrap_or_default());
    body.insert("versions".to_owned(), versions.into());
    body
}

fn resource(kind: &Kind) -> Value {
    let mut resource = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": kind.verbs,
    });
    lists(&mut resource, kind);
    if !kind.storage_version_hash.is_empty() {
        resource["storageVersionHash"] = kind.storage_version_hash.into();
    }
    resource
}

/// What both forms list alike.
fn lists(resource: &mut Value, kind: &Kind) {
    if !kind.short_names.is_empty() {
        resource["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        resource["categories"] = json!(kind.categories);
    }
}

fn subresource(kind: &Kind, sub: &Subresource) -> Value {
    let mut resource = json!({
        "name": format!("{}/{}", kind.plural, sub.name),
        "singularName": "",
        "namespaced": kind.namespaced,
        "kind": sub.kind,
        "verbs": sub.verbs,
    });
    if sub.foreign {
        resource["group"] = sub.group.into();
        resource["version"] = sub.version.into();
    }
    resource
}

/// Group and version stay empty where they are the resource's own; clients fill them in.
fn response_kind(gvk: Gvk<'_>, foreign: bool) -> Value {
    let (group, version) = if foreign { (gvk.group, gvk.version) } else { ("", "") };
    json!({"group": group, "version": version, "kind": gvk.kind})
}

fn aggregated_resource(kind: &Kind) -> Value {
    let mut resource = json!({
        "resource": kind.plural,
        "singularResource": kind.singular,
        "responseKind": response_kind(kind.gvk(), false),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "verbs": kind.verbs,
    });
    lists(&mut resource, kind);
    if !kind.subresources.is_empty() {
        let subresources = kind.subresources.iter().map(|sub| {
            let response_kind = response_kind(sub.gvk(), sub.foreign);
            json!({"subresource": sub.name, "responseKind": response_kind, "verbs": sub.verbs})
        });
        resource["subresources"] = subresources.collect();
    }
    resource
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::kinds;

    /// Upstream's documents, where the checkout has them beside it.
    fn upstream() -> Option<PathBuf> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let found =
            manifest.ancestors().map(|dir| dir.join("shared/k8s-1.36/discovery")).find(|dir| dir.is_dir());
        if found.is_none() {
            let required = std::env::var("WEFT_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name == "k8s-data"), "upstream's API data is required");
            eprintln!("SKIP: needs upstream's API data in ../shared");
        }
        found
    }

    fn read(dir: &Path, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
    }

    #[test]
    fn documents_equal_upstreams() {
        let Some(dir) = upstream() else { return };
        assert_eq!(core_versions("10.10.10.10:8050"), read(&dir, "api.json"));
        assert_eq!(group_list(kinds::all()), read(&dir, "apis.json"));
        assert_eq!(aggregated(kinds::all(), false, Aggregated::V2), read(&dir, "aggregated_v2.json"));
        assert_eq!(resource_list(kinds::all(), "", "v1").unwrap(), read(&dir, "api__v1.json"));
        let mut compared = 0;
        for kind in kinds::all().iter().filter(|kind| !kind.group.is_empty()) {
            let (name, version) = (kind.group, kind.version);
            assert_eq!(group(kinds::all(), name).unwrap(), read(&dir, &format!("apis__{name}.json")));
            let list = resource_list(kinds::all(), name, version).unwrap();
            assert_eq!(list, read(&dir, &format!("apis__{name}__{version}.json")));
            compared += 1;
        }
        assert!(compared > 50);
    }

    #[test]
    fn stable_versions_alone() {
        let list = group_list(kinds::served());
        let groups: Vec<&str> =
            list["groups"].as_array().unwrap().iter().map(|group| group["name"].as_str().unwrap()).collect();
        assert_eq!(&groups[..3], ["apiregistration.k8s.io", "apps", "events.k8s.io"]);
        assert!(!groups.contains(&"internal.apiserver.k8s.io"));
        let autoscaling = group(kinds::served(), "autoscaling").unwrap();
        assert_eq!(autoscaling["preferredVersion"]["version"], "v2");
        assert!(group(kinds::served(), "none").is_none() && group(kinds::served(), "").is_none());
        assert!(resource_list(kinds::served(), "resource.k8s.io", "v1beta1").is_none());
        let core = aggregated(kinds::served(), true, Aggregated::V2Beta1);
        assert_eq!(core["apiVersion"], "apidiscovery.k8s.io/v2beta1");
        assert_eq!(core["items"].as_array().unwrap().len(), 1);
        let pods = core["items"][0]["versions"][0]["resources"].as_array().unwrap();
        let pods = pods.iter().find(|resource| resource["resource"] == "pods").unwrap();
        assert_eq!(
            pods["subresources"][2],
            json!({"subresource": "ephemeralcontainers",
            "responseKind": {"group": "", "version": "", "kind": "Pod"}, "verbs": ["get", "patch", "update"]})
        );
        assert_eq!(pods["subresources"][3]["responseKind"]["group"], "policy");
    }

    #[test]
    fn accept_headers() {
        for form in [Aggregated::V2, Aggregated::V2Beta1] {
            assert_eq!(Aggregated::from_media_type(form.content_type()), Some(form));
        }
        assert_eq!(Aggregated::from_media_type("application/json"), None);
    }
}

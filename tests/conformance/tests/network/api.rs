//! Kinds of the network as a client meets them: discovery, every verb, status.

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Endpoints, Service};
use kube::ResourceExt as _;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, WatchEvent,
    WatchParams,
};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};
use weft_tests_conformance::Site;

/// A kind to go through all verbs with.
struct Kind {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    /// What the status is set to, if it is a subresource.
    status: Option<Value>,
    /// Whether a write of the status may change annotations.
    status_annotates: bool,
}

type Events = BoxStream<'static, kube::Result<WatchEvent<DynamicObject>>>;

impl Kind {
    fn api(&self, site: &Site, everywhere: bool) -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk(self.group, "v1", self.kind);
        let resource = ApiResource::from_gvk_with_plural(&gvk, self.plural);
        if self.namespaced && !everywhere {
            Api::namespaced_with(site.client.clone(), &site.namespace, &resource)
        } else {
            Api::all_with(site.client.clone(), &resource)
        }
    }
}

/// Group, version and resource stand in the documents that clients look for them in.
async fn discovered(site: &Site, kind: &Kind) -> anyhow::Result<()> {
    let named = |list: &Value, key: &str, name: &str| {
        list.as_array().is_some_and(|items| items.iter().any(|item| item[key] == name))
    };
    let version = format!("{}/v1", kind.group);
    let groups = site.raw("GET", "/apis", None).await?;
    ensure!(named(&groups["groups"], "name", kind.group), "{} is not in /apis", kind.group);
    let group = site.raw("GET", &format!("/apis/{}", kind.group), None).await?;
    ensure!(named(&group["versions"], "groupVersion", &version), "{version} is not in its group");
    let resources = site.raw("GET", &format!("/apis/{version}"), None).await?;
    ensure!(named(&resources["resources"], "name", kind.plural), "{} is not in {version}", kind.plural);
    let status = format!("{}/status", kind.plural);
    let has_status = named(&resources["resources"], "name", &status);
    ensure!(has_status == kind.status.is_some(), "{status} in {version}: {has_status}");
    Ok(())
}

/// Waits for an event that `accept` takes.
async fn event(
    events: &mut Events,
    what: &str,
    accept: impl Fn(&WatchEvent<DynamicObject>) -> bool,
) -> anyhow::Result<()> {
    loop {
        let next = events.next().await.with_context(|| format!("the watch ended before {what}"))??;
        ensure!(!matches!(next, WatchEvent::Error(_)), "before {what} the watch said {next:?}");
        if accept(&next) {
            return Ok(());
        }
    }
}

fn annotated(event: &WatchEvent<DynamicObject>, key: &str) -> bool {
    matches!(event, WatchEvent::Modified(object) if object.annotations().contains_key(key))
}

/// Every verb of a kind. `make` gives the body of the object with a number, its name included.
async fn verbs(site: &Site, kind: &Kind, make: impl Fn(u8) -> Value) -> anyhow::Result<()> {
    discovered(site, kind).await?;
    let api = kind.api(site, false);
    let selector = format!("special={}", site.namespace);
    let selected = ListParams::default().labels(&selector);
    let mut names = Vec::new();
    for number in 1..=3 {
        let mut object = make(number);
        object["apiVersion"] = json!(format!("{}/v1", kind.group));
        object["kind"] = json!(kind.kind);
        object["metadata"]["labels"]["special"] = json!(site.namespace);
        let made =
            api.create(&PostParams::default(), &serde_json::from_value(object)?).await.context("create")?;
        ensure!(made.uid().is_some() && made.creation_timestamp().is_some(), "{made:?}");
        names.push(made.name_any());
    }
    let name = names[0].as_str();
    ensure!(api.get(name).await.context("get")?.name_any() == name, "get answers another object");
    let list = api.list(&selected).await.context("list")?;
    ensure!(list.items.len() == 3, "list has {} objects", list.items.len());
    let everywhere = kind.api(site, true).list(&selected).await.context("list of all namespaces")?;
    ensure!(everywhere.items.len() == 3, "list of all namespaces has {} objects", everywhere.items.len());
    let since = list.metadata.resource_version.context("a list has a version")?;
    let params = WatchParams::default().labels(&selector);
    let mut events: Events = api.watch(&params, &since).await.context("watch")?.boxed();

    let patch = Patch::Merge(json!({"metadata": {"annotations": {"patched": "true"}}}));
    let patched = api.patch(name, &PatchParams::default(), &patch).await.context("patch")?;
    ensure!(patched.annotations().contains_key("patched"), "{patched:?}");
    event(&mut events, "the patch", |event| annotated(event, "patched")).await?;
    let updated = replaced(async || {
        let mut object = api.get(name).await?;
        object.annotations_mut().insert("updated".to_owned(), "true".to_owned());
        api.replace(name, &PostParams::default(), &object).await
    })
    .await
    .context("update")?;
    ensure!(updated.annotations().contains_key("updated"), "{updated:?}");
    event(&mut events, "the update", |event| annotated(event, "updated")).await?;
    if let Some(status) = &kind.status {
        statuses(&api, name, status, kind.status_annotates).await?;
    }

    api.delete(name, &DeleteParams::default()).await.context("delete")?;
    event(
        &mut events,
        "the deletion",
        |event| matches!(event, WatchEvent::Deleted(object) if object.name_any() == name),
    )
    .await?;
    ensure!(api.get_opt(name).await?.is_none(), "{name} is still there");
    api.delete_collection(&DeleteParams::default(), &selected).await.context("deletecollection")?;
    site.until(&format!("no {} is left", kind.plural), async || {
        Ok(api.list(&selected).await?.items.is_empty().then_some(()))
    })
    .await
}

/// Reads and writes anew as long as somebody else, such as the kind's controller, is faster.
async fn replaced(write: impl AsyncFn() -> kube::Result<DynamicObject>) -> kube::Result<DynamicObject> {
    loop {
        match write().await {
            Err(kube::Error::Api(status)) if status.reason == "Conflict" => {}
            written => return written,
        }
    }
}

/// The status by patch and by update; neither touches the spec, nor a write of the object the status.
async fn statuses(
    api: &Api<DynamicObject>,
    name: &str,
    status: &Value,
    annotates: bool,
) -> anyhow::Result<()> {
    let patch = json!({"metadata": {"annotations": {"patchedstatus": "true"}}, "status": status});
    let patched = api
        .patch_status(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .context("patch of status")?;
    ensure!(patched.annotations().contains_key("patchedstatus") == annotates, "{patched:?}");
    ensure!(contains(&patched.data["status"], status), "the status is {}", patched.data["status"]);
    let spec = api.get_status(name).await.context("get of status")?.data["spec"].clone();
    let updated = replaced(async || {
        let mut object = api.get_status(name).await?;
        object.annotations_mut().insert("updatedstatus".to_owned(), "true".to_owned());
        api.replace_status(name, &PostParams::default(), &object).await
    })
    .await
    .context("update of status")?;
    ensure!(updated.annotations().contains_key("updatedstatus") == annotates, "{updated:?}");
    ensure!(updated.data["spec"] == spec && contains(&updated.data["status"], status), "{updated:?}");
    let patch = Patch::Merge(json!({"status": null}));
    let same = api.patch(name, &PatchParams::default(), &patch).await?;
    ensure!(contains(&same.data["status"], status), "a write of the object changed its status");
    Ok(())
}

/// Whether `whole` has all that `part` has; lists in any order, and with more.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|other| contains(other, value)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            part.iter().all(|part| whole.iter().any(|whole| contains(whole, part)))
        }
        (whole, part) => whole == part,
    }
}

pub(crate) async fn endpoint_slices(site: Site) -> anyhow::Result<()> {
    let kind = Kind {
        group: "discovery.k8s.io",
        kind: "EndpointSlice",
        plural: "endpointslices",
        namespaced: true,
        status: None,
        status_annotates: false,
    };
    let make = |number: u8| {
        json!({
            "metadata": {"name": format!("slice-{number}")},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [format!("10.1.2.{number}")], "conditions": {"ready": true}}],
            "ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
        })
    };
    verbs(&site, &kind, make).await
}

pub(crate) async fn ingresses(site: Site) -> anyhow::Result<()> {
    let kind = Kind {
        group: "networking.k8s.io",
        kind: "Ingress",
        plural: "ingresses",
        namespaced: true,
        status: Some(json!({"loadBalancer": {"ingress": [{"ip": "169.1.1.1"}]}})),
        status_annotates: true,
    };
    let make = |number: u8| {
        let backend = json!({"service": {"name": "web", "port": {"number": 80}}});
        json!({
            "metadata": {"name": format!("ingress-{number}")},
            "spec": {"defaultBackend": backend, "rules": [{"host": format!("host-{number}.example.com"),
                "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}]},
        })
    };
    verbs(&site, &kind, make).await
}

pub(crate) async fn ingress_classes(site: Site) -> anyhow::Result<()> {
    let kind = Kind {
        group: "networking.k8s.io",
        kind: "IngressClass",
        plural: "ingressclasses",
        namespaced: false,
        status: None,
        status_annotates: false,
    };
    let make = |number: u8| {
        json!({
            "metadata": {"name": format!("{}-{number}", site.namespace)},
            "spec": {"controller": "example.com/controller"},
        })
    };
    verbs(&site, &kind, make).await
}

pub(crate) async fn ip_addresses(site: Site) -> anyhow::Result<()> {
    let kind = Kind {
        group: "networking.k8s.io",
        kind: "IPAddress",
        plural: "ipaddresses",
        namespaced: false,
        status: None,
        status_annotates: false,
    };
    // No Service's range holds these, and the parent need not exist, so nobody repairs them meanwhile.
    let make = |number: u8| {
        let parent = json!({"group": "example.com", "resource": "things", "namespace": "n", "name": "thing"});
        json!({"metadata": {"name": format!("192.0.2.{number}")}, "spec": {"parentRef": parent}})
    };
    verbs(&site, &kind, make).await
}

pub(crate) async fn service_cidrs(site: Site) -> anyhow::Result<()> {
    let condition = json!({"type": "example", "status": "True", "reason": "Test", "message": "set by a test",
        "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let kind = Kind {
        group: "networking.k8s.io",
        kind: "ServiceCIDR",
        plural: "servicecidrs",
        namespaced: false,
        status: Some(json!({"conditions": [condition]})),
        status_annotates: false,
    };
    let make = |number: u8| {
        json!({
            "metadata": {"name": format!("{}-{number}", site.namespace)},
            "spec": {"cidrs": [format!("10.196.{number}.0/24")]},
        })
    };
    verbs(&site, &kind, make).await
}

pub(crate) async fn endpoints_lifecycle(site: Site) -> anyhow::Result<()> {
    let api = site.api::<Endpoints>();
    let subsets =
        |ip: &str, port: u16| json!([{"addresses": [{"ip": ip}], "ports": [{"name": "http", "port": port}]}]);
    let labels = json!({"test": "endpoint"});
    let made = site
        .create::<Endpoints>(
            json!({"metadata": {"name": "custom", "labels": labels}, "subsets": subsets("10.0.0.24", 80)}),
        )
        .await?;
    let since = made.resource_version().context("a stored object has a version")?;
    let mut events = api.watch(&WatchParams::default().labels("test=endpoint"), &since).await?.boxed();
    let mut object = api.get("custom").await?;
    object.labels_mut().insert("updated".to_owned(), "true".to_owned());
    api.replace("custom", &PostParams::default(), &object).await?;
    let list = api.list(&ListParams::default().labels("updated=true")).await?;
    ensure!(list.items.len() == 1, "the new label finds {} objects", list.items.len());
    let patched = site.merge::<Endpoints>("custom", json!({"subsets": subsets("10.0.0.25", 8080)})).await?;
    let subset = patched.subsets.iter().flatten().next().context("there is a subset")?;
    ensure!(subset.addresses.iter().flatten().any(|a| a.ip == "10.0.0.25"), "{subset:?}");
    ensure!(subset.ports.iter().flatten().any(|p| p.port == 8080), "{subset:?}");
    api.delete_collection(&DeleteParams::default(), &ListParams::default().labels("test=endpoint")).await?;
    while let Some(event) = events.next().await {
        if let WatchEvent::Deleted(object) = event? {
            ensure!(object.name_any() == "custom", "{} was deleted", object.name_any());
            ensure!(api.get_opt("custom").await?.is_none(), "it is still there");
            return Ok(());
        }
    }
    anyhow::bail!("the watch ended before the deletion")
}

pub(crate) async fn service_status(site: Site) -> anyhow::Result<()> {
    let api = site.api::<Service>();
    let spec = json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/none", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]});
    let object =
        json!({"metadata": {"name": "svc", "labels": {"test-service-static": "true"}}, "spec": spec});
    let made = site.create::<Service>(object).await?;
    let since = made.resource_version().context("a stored object has a version")?;
    let mut events =
        api.watch(&WatchParams::default().labels("test-service-static=true"), &since).await?.boxed();
    ensure!(api.get_status("svc").await?.name_any() == "svc", "get of status answers the Service");
    let balancer = json!({"ingress": [{"ip": "203.0.113.1"}]});
    let patch =
        json!({"metadata": {"annotations": {"patchedstatus": "true"}}, "status": {"loadBalancer": balancer}});
    let patched = api.patch_status("svc", &PatchParams::default(), &Patch::Merge(patch)).await?;
    let ingress = |service: &Service| {
        let status = service.status.as_ref()?.load_balancer.as_ref()?;
        status.ingress.as_ref()?.first()?.ip.clone()
    };
    ensure!(ingress(&patched).as_deref() == Some("203.0.113.1"), "{:?}", patched.status);
    let mut object = api.get("svc").await?;
    let condition = json!([{"type": "StatusUpdate", "status": "True", "reason": "E2E", "message": "Set from a test",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    object.status.get_or_insert_default().conditions = Some(serde_json::from_value(condition)?);
    let updated = api.replace_status("svc", &PostParams::default(), &object).await?;
    let conditions = updated.status.iter().flat_map(|status| status.conditions.iter().flatten());
    ensure!(
        conditions.into_iter().any(|condition| condition.type_ == "StatusUpdate"),
        "{:?}",
        updated.status
    );
    let patched =
        site.merge::<Service>("svc", json!({"metadata": {"labels": {"test-service": "patched"}}})).await?;
    ensure!(ingress(&patched).as_deref() == Some("203.0.113.1"), "a patch of the Service changed its status");
    site.delete::<Service>("svc").await?;
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        match event? {
            WatchEvent::Modified(service) => seen.push(service),
            WatchEvent::Deleted(_) => {
                let labelled = seen.iter().any(|service| service.labels().contains_key("test-service"));
                let has_status = seen.iter().any(|service| ingress(service).is_some());
                ensure!(labelled && has_status, "the watch missed a change: {seen:?}");
                return Ok(());
            }
            other @ (WatchEvent::Added(_) | WatchEvent::Bookmark(_) | WatchEvent::Error(_)) => {
                anyhow::bail!("an unexpected event: {other:?}")
            }
        }
    }
    anyhow::bail!("the watch ended before the deletion")
}

pub(crate) async fn delete_services(site: Site) -> anyhow::Result<()> {
    let api = site.api::<Service>();
    for (name, label) in [("one", "delete"), ("two", "delete"), ("three", "keep")] {
        let spec = json!({"ports": [{"name": "http", "port": 80}, {"name": "https", "port": 443}]});
        site.create::<Service>(json!({"metadata": {"name": name, "labels": {"fate": label}}, "spec": spec}))
            .await?;
    }
    ensure!(api.list(&ListParams::default()).await?.items.len() == 3, "three Services were made");
    api.delete_collection(&DeleteParams::default(), &ListParams::default().labels("fate=delete")).await?;
    let left: Vec<String> =
        api.list(&ListParams::default()).await?.iter().map(kube::ResourceExt::name_any).collect();
    ensure!(left == ["three"], "{left:?} are left");
    Ok(())
}

pub(crate) async fn find_service(site: Site) -> anyhow::Result<()> {
    let list = Api::<Service>::all(site.client.clone()).list(&ListParams::default()).await?;
    let found =
        list.iter().any(|s| s.name_any() == "kubernetes" && s.namespace().as_deref() == Some("default"));
    ensure!(found, "no Service kubernetes in the namespace default");
    Ok(())
}

//! The environment of a container, and `$(NAME)` in its command and arguments.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, ResourceFieldSelector};

use crate::objects::{Data, Kind, ReadError};
use crate::pod::{self, PodId};
use crate::quantity::{milli, milli_of, value_of};
use crate::shared::Shared;

/// Why a container can't be configured (upstream's `CreateContainerConfigError`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Object(#[from] ReadError),
    #[error("couldn't find key {key} in {kind} {namespace}/{name}", kind = kind.spelled())]
    NoKey { kind: Kind, namespace: String, name: String, key: String },
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    #[error("container {0} not found")]
    NoContainer(String),
    #[error("unsupported container resource : {0}")]
    Resource(String),
    #[error("pod has no IP yet")]
    NoIp,
    #[error("services have not yet been read at least once, cannot construct envvars")]
    NoServices,
}

/// How long the first reading of the Services is waited for.
const SERVICES_READ: std::time::Duration = std::time::Duration::from_secs(10);

/// Facts about the node and the sandbox that fields may name.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// The primary family's first; never empty.
    pub(crate) node_ips: Vec<IpAddr>,
    /// Likewise, empty until the pod has a network.
    pub(crate) pod_ips: Vec<IpAddr>,
    /// `cpu` in thousandths, the others in bytes; stands in for absent limits.
    pub(crate) allocatable: BTreeMap<String, i64>,
}

/// All variables, in the order of the specification; those of Services come last and never replace one.
pub(crate) async fn make(
    shared: &Shared,
    pod: &Pod,
    container: &Container,
    facts: &Facts,
) -> Result<Vec<(String, String)>, Error> {
    let id = PodId::of(pod);
    tokio::time::timeout(SERVICES_READ, shared.services.synced())
        .await
        .map_err(|_elapsed| Error::NoServices)?;
    let services =
        shared.services.variables(&id.namespace, pod::spec(pod).enable_service_links.unwrap_or(true));
    let mut own = Own::default();
    for from in container.env_from.iter().flatten() {
        let (kind, name, optional) = match (&from.config_map_ref, &from.secret_ref) {
            (Some(r), _) => (Kind::ConfigMap, &r.name, r.optional),
            (_, Some(r)) => (Kind::Secret, &r.name, r.optional),
            _ => continue,
        };
        let prefix = from.prefix.as_deref().unwrap_or_default();
        for (key, value) in read(shared, &id, (kind, name), optional.unwrap_or(false)).await?.iter() {
            let (key, value) = (format!("{prefix}{key}"), String::from_utf8_lossy(value).into_owned());
            own.put(key, value);
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(source)) => match from_source(shared, (pod, container), source, facts).await? {
                Some(value) => value,
                None => continue,
            },
            (value, None) => expand(value.as_deref().unwrap_or_default(), &own.known, &services),
        };
        own.put(variable.name.clone(), value);
    }
    let Own { order, mut known } = own;
    let more: Vec<_> = services.into_iter().filter(|(name, _)| !known.contains_key(name)).collect();
    let mut all: Vec<_> = order.into_iter().filter_map(|name| known.remove_entry(&name)).collect();
    all.extend(more);
    Ok(all)
}

/// What a container's specification names, each name where it came first, with its last value. A ConfigMap may hold thousands.
#[derive(Default)]
struct Own {
    order: Vec<String>,
    known: BTreeMap<String, String>,
}

impl Own {
    fn put(&mut self, name: String, value: String) {
        if self.known.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }
}

async fn read(
    shared: &Shared,
    id: &PodId,
    (kind, name): (Kind, &str),
    optional: bool,
) -> Result<std::sync::Arc<Data>, Error> {
    match shared.objects.hold(kind, &id.namespace, name).read().await {
        Err(ReadError::NotFound { .. }) if optional => Ok(std::sync::Arc::default()),
        other => Ok(other?),
    }
}

async fn from_source(
    shared: &Shared,
    (pod, container): (&Pod, &Container),
    source: &EnvVarSource,
    facts: &Facts,
) -> Result<Option<String>, Error> {
    if let Some(field) = &source.field_ref {
        return self::field(pod, &field.field_path, facts).map(Some);
    }
    if let Some(resource) = &source.resource_field_ref {
        return self::resource(pod, container, resource, facts).map(Some);
    }
    let (kind, name, key, optional) = match (&source.config_map_key_ref, &source.secret_key_ref) {
        (Some(r), _) => (Kind::ConfigMap, &r.name, &r.key, r.optional.unwrap_or(false)),
        (_, Some(r)) => (Kind::Secret, &r.name, &r.key, r.optional.unwrap_or(false)),
        _ => return Ok(None),
    };
    let id = PodId::of(pod);
    let data = read(shared, &id, (kind, name), optional).await?;
    match data.get(key) {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional => Ok(None),
        None => Err(Error::NoKey { kind, namespace: id.namespace, name: name.clone(), key: key.clone() }),
    }
}

/// The value of a field of the pod, as variables and the downward API give it.
pub(crate) fn field(pod: &Pod, path: &str, facts: &Facts) -> Result<String, Error> {
    let meta = &pod.metadata;
    let listed = |map: &Option<BTreeMap<String, String>>| {
        let lines = map.iter().flatten().map(|(key, value)| format!("{key}={}", go_quote(value)));
        lines.collect::<Vec<_>>().join("\n")
    };
    let member = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default()
    };
    let first = |ips: &[IpAddr]| ips.first().map(ToString::to_string).ok_or(Error::NoIp);
    let joined = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => listed(&meta.labels),
        "metadata.annotations" => listed(&meta.annotations),
        "spec.nodeName" => pod::spec(pod).node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => pod::spec(pod).service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => first(&facts.node_ips)?,
        "status.hostIPs" => joined(&facts.node_ips),
        "status.podIP" => first(&facts.pod_ips)?,
        "status.podIPs" => joined(&facts.pod_ips),
        _ => {
            let keyed = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
            if let Some(key) = keyed("metadata.labels['") {
                member(&meta.labels, key)
            } else if let Some(key) = keyed("metadata.annotations['") {
                member(&meta.annotations, key)
            } else {
                return Err(Error::Field(path.to_owned()));
            }
        }
    })
}

/// A string in quotes, as Go's `%q` for printable text.
fn go_quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A limit or request of a container, divided and rounded up.
pub(crate) fn resource(
    pod: &Pod,
    container: &Container,
    selector: &ResourceFieldSelector,
    facts: &Facts,
) -> Result<String, Error> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let container = match named {
        Some(name) => pod::find_container(pod, name).ok_or_else(|| Error::NoContainer(name.to_owned()))?.0,
        None => container,
    };
    let (side, name) =
        selector.resource.split_once('.').ok_or_else(|| Error::Resource(selector.resource.clone()))?;
    let resources = container.resources.as_ref();
    let list = match side {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(Error::Resource(selector.resource.clone())),
    };
    let quantity = list.and_then(|l| l.get(name));
    let stand_in = || if side == "limits" { facts.allocatable.get(name).copied().unwrap_or(0) } else { 0 };
    let value_milli: i128 = if name == "cpu" {
        quantity.map_or_else(stand_in, milli_of).into()
    } else {
        i128::from(quantity.map_or_else(stand_in, value_of)) * 1000
    };
    let divisor = selector.divisor.as_ref().and_then(|d| milli(&d.0)).filter(|d| *d > 0).unwrap_or(1000);
    Ok(((value_milli + divisor - 1) / divisor).to_string())
}

/// Replaces `$(NAME)` by its value; `$$` is a plain `$`; an unknown name stays as it is written.
pub(crate) fn expand(
    text: &str,
    known: &BTreeMap<String, String>,
    more: &BTreeMap<String, String>,
) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(tail) = after.strip_prefix('$') {
            result.push('$');
            rest = tail;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match known.get(name).or_else(|| more.get(name)) {
                Some(value) => result.push_str(value),
                None => result.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result.push_str(rest);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn facts() -> Facts {
        Facts {
            node_ips: ["10.0.0.1", "fd44::1"].map(|ip| ip.parse().unwrap()).into(),
            pod_ips: ["10.42.0.5", "fd42::5"].map(|ip| ip.parse().unwrap()).into(),
            allocatable: BTreeMap::from([("cpu".into(), 2000), ("memory".into(), 4096)]),
        }
    }

    #[test]
    fn expansion_follows_upstreams_rules() {
        let known = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "$(A)".to_owned())]);
        for (text, expected) in [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(B)", "$(A)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$(NONE)", "$(NONE)"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
        ] {
            assert_eq!(expand(text, &known, &BTreeMap::new()), expected, "{text}");
        }
    }

    #[test]
    fn fields_and_resources_have_upstreams_values() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n",
            "labels": {"a": "x", "b": "say \"hi\""}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"memory": "64Mi"}}}]}}))
        .unwrap();
        assert_eq!(field(&pod, "metadata.labels", &facts()).unwrap(), "a=\"x\"\nb=\"say \\\"hi\\\"\"");
        assert_eq!(field(&pod, "metadata.labels['a']", &facts()).unwrap(), "x");
        for (path, expected) in [
            ("status.podIP", "10.42.0.5"),
            ("status.podIPs", "10.42.0.5,fd42::5"),
            ("status.hostIP", "10.0.0.1"),
            ("status.hostIPs", "10.0.0.1,fd44::1"),
        ] {
            assert_eq!(field(&pod, path, &facts()).unwrap(), expected, "{path}");
        }
        assert_eq!(field(&pod, "spec.nope", &facts()), Err(Error::Field("spec.nope".into())));
        let c = &pod::containers(&pod)[0];
        let ask = |resource: &str, divisor: Option<&str>| {
            let selector = ResourceFieldSelector {
                resource: resource.into(),
                divisor: divisor.map(|d| k8s_openapi::apimachinery::pkg::api::resource::Quantity(d.into())),
                container_name: None,
            };
            super::resource(&pod, c, &selector, &facts()).unwrap()
        };
        assert_eq!(ask("limits.memory", Some("1Mi")), "64");
        assert_eq!(ask("limits.cpu", None), "2");
        assert_eq!(ask("limits.cpu", Some("1m")), "2000");
        assert_eq!(ask("requests.cpu", None), "0");
    }
}

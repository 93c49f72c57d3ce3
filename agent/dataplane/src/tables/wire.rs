//! The few fields of Services and EndpointSlices that a node's tables are made of, borrowed from the JSON that came. What is not named
//! here is skipped unread. A field that is `null` counts as one that is not there: kube-apiserver writes both.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

/// Text, copied only if the JSON has escapes in it.
#[derive(Debug, Default, Deserialize)]
pub struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// A Service.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service<'a> {
    #[serde(borrow)]
    pub(super) metadata: Metadata<'a>,
    pub(super) spec: Option<ServiceSpec<'a>>,
    pub(super) status: Option<ServiceStatus<'a>>,
}

impl Service<'_> {
    /// Versions can be compared (KEP-5504); 0 for one that can't be read, which is reported to nobody.
    pub(crate) fn version(&self) -> u64 {
        self.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata<'a> {
    #[serde(borrow)]
    pub(super) name: Option<Text<'a>>,
    pub(super) namespace: Option<Text<'a>>,
    pub(super) resource_version: Option<Text<'a>>,
    pub(super) creation_timestamp: Option<Text<'a>>,
    pub(super) labels: Option<Labels<'a>>,
    pub(super) annotations: Option<Annotations<'a>>,
}

impl Metadata<'_> {
    /// Namespace and name.
    pub(super) fn names(&self) -> Option<(&str, &str)> {
        Some((self.namespace.as_deref()?, self.name.as_deref()?))
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Labels<'a> {
    /// On a slice: its Service.
    #[serde(borrow, rename = "kubernetes.io/service-name")]
    pub(super) service_name: Option<Text<'a>>,
    /// On a Service that another proxy serves.
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    pub(super) other_proxy: Option<Text<'a>>,
    /// On a Service that no proxy serves, and on a slice that counts for none.
    #[serde(rename = "service.kubernetes.io/headless")]
    pub(super) headless: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Annotations<'a> {
    /// On a Service: `10000-10099/UDP, 7000-7009`.
    #[serde(borrow, rename = "weft.dev/port-ranges")]
    pub(super) port_ranges: Option<Text<'a>>,
    /// On a Service: `true` has endpoints left out whose connections fail.
    #[serde(rename = "weft.dev/ejection")]
    pub(super) ejection: Option<Text<'a>>,
    /// On a Service: how a backend is chosen for clients outside, `maglev` or `random`.
    #[serde(rename = "weft.dev/backend-choice")]
    pub(super) backend_choice: Option<Text<'a>>,
    /// On a slice: the weight of each of its endpoints.
    #[serde(rename = "weft.dev/weight")]
    pub(super) weight: Option<Text<'a>>,
    /// On a slice: the time of the change that it carries on.
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub(super) trigger_time: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ServiceSpec<'a> {
    #[serde(borrow, rename = "type")]
    pub(super) kind: Option<Text<'a>>,
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<Text<'a>>,
    #[serde(rename = "clusterIPs")]
    pub(super) cluster_ips: Option<Vec<Text<'a>>>,
    #[serde(rename = "externalIPs")]
    pub(super) external_ips: Option<Vec<Text<'a>>>,
    pub(super) load_balancer_class: Option<Text<'a>>,
    pub(super) load_balancer_source_ranges: Option<Vec<Text<'a>>>,
    pub(super) ports: Option<Vec<Port<'a>>>,
    pub(super) session_affinity: Option<Text<'a>>,
    pub(super) session_affinity_config: Option<AffinityConfig>,
    pub(super) internal_traffic_policy: Option<Text<'a>>,
    pub(super) external_traffic_policy: Option<Text<'a>>,
    pub(super) health_check_node_port: Option<i32>,
}

/// A Service's port, or a slice's.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Port<'a> {
    #[serde(borrow)]
    pub(super) name: Option<Text<'a>>,
    pub(super) port: Option<i32>,
    pub(super) node_port: Option<i32>,
    pub(super) protocol: Option<Text<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AffinityConfig {
    #[serde(rename = "clientIP")]
    pub(super) client_ip: Option<ClientAffinity>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ClientAffinity {
    pub(super) timeout_seconds: Option<i32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ServiceStatus<'a> {
    #[serde(borrow)]
    pub(super) load_balancer: Option<LoadBalancer<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LoadBalancer<'a> {
    #[serde(borrow)]
    pub(super) ingress: Option<Vec<Ingress<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Ingress<'a> {
    #[serde(borrow)]
    pub(super) ip: Option<Text<'a>>,
    pub(super) ip_mode: Option<Text<'a>>,
}

/// An EndpointSlice.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Slice<'a> {
    #[serde(borrow)]
    pub(super) metadata: Metadata<'a>,
    pub(super) address_type: Option<Text<'a>>,
    pub(super) endpoints: Option<Vec<Endpoint<'a>>>,
    pub(super) ports: Option<Vec<Port<'a>>>,
}

impl Slice<'_> {
    /// The time of the change that it carries on, if it says so.
    pub(crate) fn trigger_time(&self) -> Option<&str> {
        self.metadata.annotations.as_ref()?.trigger_time.as_deref()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Endpoint<'a> {
    /// Only the first address is meant to be used (discovery/v1 Endpoint.addresses).
    #[serde(borrow)]
    pub(super) addresses: Option<First<'a>>,
    pub(super) conditions: Option<Conditions>,
    pub(super) hints: Option<Hints<'a>>,
    pub(super) node_name: Option<Text<'a>>,
    pub(super) target_ref: Option<Target<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
    pub(super) serving: Option<bool>,
    pub(super) terminating: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Hints<'a> {
    #[serde(borrow)]
    pub(super) for_zones: Option<Vec<Named<'a>>>,
    pub(super) for_nodes: Option<Vec<Named<'a>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Named<'a> {
    #[serde(borrow)]
    pub(super) name: Text<'a>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Target<'a> {
    #[serde(borrow)]
    pub(super) uid: Option<Text<'a>>,
}

/// The first text of a list.
#[derive(Debug, Default)]
pub(super) struct First<'a>(pub(super) Option<Text<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for First<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = First<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<First<'de>, A::Error> {
                let first = list.next_element()?;
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first))
            }
        }
        deserializer.deserialize_seq(Reader)
    }
}

/// What an object of any kind is called, for one of which no more can be read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Anything<'a> {
    #[serde(borrow)]
    metadata: Metadata<'a>,
}

impl Anything<'_> {
    /// Namespace and name.
    pub(crate) fn names(&self) -> Option<(&str, &str)> {
        self.metadata.names()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_nothing() {
        let text = r#"{"metadata": {"name": "web-1", "namespace": "default", "labels": null, "annotations": null},
            "addressType": "IPv4", "ports": null, "endpoints": null}"#;
        let slice: Slice<'_> = serde_json::from_str(text).unwrap();
        assert!(slice.endpoints.is_none() && slice.ports.is_none() && slice.trigger_time().is_none());
        let text = r#"{"endpoints": [{"addresses": null, "conditions": null, "hints": null, "nodeName": null, "targetRef": null},
            {"addresses": [], "conditions": {}, "hints": {"forZones": null}, "targetRef": {"uid": null}}]}"#;
        let slice: Slice<'_> = serde_json::from_str(text).unwrap();
        let endpoints = slice.endpoints.unwrap();
        assert!(endpoints[0].addresses.is_none() && endpoints[1].addresses.as_ref().unwrap().0.is_none());
        let text = r#"{"spec": {"clusterIPs": null, "ports": null, "sessionAffinityConfig": {"clientIP": null},
            "healthCheckNodePort": null}, "status": {"loadBalancer": {"ingress": null}, "conditions": null}}"#;
        let service: Service<'_> = serde_json::from_str(text).unwrap();
        assert!(service.spec.unwrap().ports.is_none() && service.metadata.names().is_none());
        assert!(
            serde_json::from_str::<Service<'_>>(r#"{"spec": null, "status": null}"#).unwrap().spec.is_none()
        );
    }

    #[test]
    fn text_is_borrowed_unless_it_has_escapes_and_the_rest_is_skipped() {
        let text = r#"{"kind": "EndpointSlice", "metadata": {"name": "web\u002d1", "namespace": "default",
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{\"a\": [1, \"\\n\"]}"},
            "managedFields": [{"fieldsV1": {"f:endpoints": {}}}]},
            "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.2", 3], "deprecatedTopology": {"a": "b"}}]}"#;
        let slice: Slice<'_> = serde_json::from_str(text).unwrap();
        assert_eq!(slice.metadata.names(), Some(("default", "web-1")));
        let is_borrowed = |text: &Option<Text<'_>>| matches!(text.as_ref().unwrap().0, Cow::Borrowed(_));
        assert!(is_borrowed(&slice.metadata.namespace) && !is_borrowed(&slice.metadata.name));
        let first = slice.endpoints.unwrap().remove(0).addresses.unwrap().0;
        assert!(first.as_deref() == Some("10.0.0.1") && is_borrowed(&first));
    }

    #[test]
    fn one_of_which_no_more_can_be_read_still_has_a_name() {
        let text = r#"{"metadata": {"name": "web", "namespace": "default"}, "spec": {"ports": "nonsense"}}"#;
        assert!(serde_json::from_str::<Service<'_>>(text).is_err());
        let named: Anything<'_> = serde_json::from_str(text).unwrap();
        assert_eq!(named.names(), Some(("default", "web")));
    }
}

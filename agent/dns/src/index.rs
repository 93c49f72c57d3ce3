//! Services and endpoints by name and by address. A change costs what it changes.

use std::collections::HashMap;
use std::net::IpAddr;

/// What a Service's name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The Service's own addresses.
    Addresses(Vec<IpAddr>),
    /// Its endpoints' addresses.
    Endpoints,
    /// Another name.
    Alias(String),
}

/// A port of a Service or of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) name: String,
    /// `tcp`, `udp` or `sctp`.
    pub(crate) protocol: String,
    pub(crate) port: u16,
}

/// A Service as far as names go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) target: Target,
    pub(crate) ports: Vec<Port>,
    /// Not-ready endpoints are named too.
    pub(crate) publish_not_ready: bool,
}

/// One address of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) hostname: Option<String>,
    pub(crate) ready: bool,
}

impl Endpoint {
    /// Its name below the Service's: the host name, or the address with dashes.
    pub(crate) fn label(&self) -> String {
        self.hostname.clone().unwrap_or_else(|| self.address.to_string().replace(['.', ':'], "-"))
    }
}

/// A slice of a Service's endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) service: String,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) ports: Vec<Port>,
}

#[derive(Debug, Default)]
struct Namespace {
    services: HashMap<String, Service>,
    slices: HashMap<String, Slice>,
    /// Names of slices by Service.
    by_service: HashMap<String, Vec<String>>,
}

/// An endpoint's reverse name and the slice that gives it.
#[derive(Debug)]
struct Reverse {
    namespace: String,
    slice: String,
    label: String,
    service: String,
}

/// All names of the cluster.
#[derive(Debug, Default)]
pub(crate) struct Index {
    namespaces: HashMap<String, Namespace>,
    service_by_address: HashMap<IpAddr, (String, String)>,
    endpoints_by_address: HashMap<IpAddr, Vec<Reverse>>,
    services_listed: bool,
    slices_listed: bool,
}

impl Index {
    /// Whether both first lists are in.
    pub(crate) fn is_complete(&self) -> bool {
        self.services_listed && self.slices_listed
    }

    pub(crate) fn set_services_listed(&mut self) {
        self.services_listed = true;
    }

    pub(crate) fn set_slices_listed(&mut self) {
        self.slices_listed = true;
    }

    pub(crate) fn put_service(&mut self, namespace: &str, name: &str, service: Service) {
        self.remove_service(namespace, name);
        if let Target::Addresses(addresses) = &service.target {
            for address in addresses {
                self.service_by_address.insert(*address, (namespace.to_owned(), name.to_owned()));
            }
        }
        self.namespaces.entry(namespace.to_owned()).or_default().services.insert(name.to_owned(), service);
    }

    pub(crate) fn remove_service(&mut self, namespace: &str, name: &str) {
        let Some(space) = self.namespaces.get_mut(namespace) else { return };
        if let Some(Service { target: Target::Addresses(addresses), .. }) = space.services.remove(name) {
            for address in addresses {
                self.service_by_address.remove(&address);
            }
        }
        self.forget_empty(namespace);
    }

    pub(crate) fn put_slice(&mut self, namespace: &str, name: &str, slice: Slice) {
        self.remove_slice(namespace, name);
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.hostname.is_some()) {
            self.endpoints_by_address.entry(endpoint.address).or_default().push(Reverse {
                namespace: namespace.to_owned(),
                slice: name.to_owned(),
                label: endpoint.label(),
                service: slice.service.clone(),
            });
        }
        let space = self.namespaces.entry(namespace.to_owned()).or_default();
        space.by_service.entry(slice.service.clone()).or_default().push(name.to_owned());
        space.slices.insert(name.to_owned(), slice);
    }

    pub(crate) fn remove_slice(&mut self, namespace: &str, name: &str) {
        let Some(space) = self.namespaces.get_mut(namespace) else { return };
        let Some(old) = space.slices.remove(name) else { return };
        if let Some(names) = space.by_service.get_mut(&old.service) {
            names.retain(|other| other != name);
            if names.is_empty() {
                space.by_service.remove(&old.service);
            }
        }
        for endpoint in &old.endpoints {
            if let Some(reverse) = self.endpoints_by_address.get_mut(&endpoint.address) {
                reverse.retain(|entry| entry.namespace != namespace || entry.slice != name);
                if reverse.is_empty() {
                    self.endpoints_by_address.remove(&endpoint.address);
                }
            }
        }
        self.forget_empty(namespace);
    }

    fn forget_empty(&mut self, namespace: &str) {
        let empty = |space: &Namespace| space.services.is_empty() && space.slices.is_empty();
        if self.namespaces.get(namespace).is_some_and(empty) {
            self.namespaces.remove(namespace);
        }
    }

    /// Whether a namespace has any Service.
    pub(crate) fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|space| !space.services.is_empty())
    }

    pub(crate) fn service(&self, namespace: &str, name: &str) -> Option<&Service> {
        self.namespaces.get(namespace)?.services.get(name)
    }

    pub(crate) fn slices<'a>(&'a self, namespace: &str, service: &str) -> impl Iterator<Item = &'a Slice> {
        let space = self.namespaces.get(namespace);
        let names = space.and_then(|space| space.by_service.get(service)).map_or(&[][..], Vec::as_slice);
        names.iter().filter_map(move |name| space?.slices.get(name))
    }

    /// The names of an address, as labels below `svc.<domain>`: `label.service.namespace` or `service.namespace`.
    pub(crate) fn names_of(&self, address: IpAddr) -> Vec<Vec<String>> {
        if let Some((namespace, name)) = self.service_by_address.get(&address) {
            return vec![vec![name.clone(), namespace.clone()]];
        }
        let entries = self.endpoints_by_address.get(&address).map_or(&[][..], Vec::as_slice);
        entries.iter().map(|e| vec![e.label.clone(), e.service.clone(), e.namespace.clone()]).collect()
    }
}

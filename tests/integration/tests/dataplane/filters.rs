//! The edge programs as filters: how Linux before 6.6 has them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use weft_agent_dataplane::programs;
use weft_cni_netlink::{Direction, FilterPlace, Netlink};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::place::{NODE, POD, Place, SOON, ask_tcp, hook_pins, serve, vip, within};

/// Programs at the node's devices: of packets that come in, and that go out.
fn filters(place: &Place) -> Vec<Option<u32>> {
    within(&place.node, || {
        let mut netlink = Netlink::open().unwrap();
        let places = ["weft0", "up0"].map(|device| netlink.link(device).unwrap().index);
        let places = places.iter().flat_map(|index| {
            [Direction::In, Direction::Out].map(|direction| FilterPlace { index: *index, direction, turn: 7 })
        });
        places.map(|place| netlink.filter(place).unwrap()).collect()
    })
}

#[test]
fn a_kernel_without_links_carries_services_and_the_next_agent_takes_over() {
    if !require("dataplane::filters", &NEEDS) {
        return;
    }
    let place = Place::new("fi").unwrap();
    let listener = within(&place.pod, || TcpListener::bind((POD, 0)).unwrap());
    let pod = listener.local_addr().unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Longer than it takes to load the programs.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() == 1 {
            stream.write_all(&byte).unwrap();
        }
    });
    let mut first = place.start_by_filters().unwrap();
    first.service(10, 30080, &[pod]).unwrap();
    let before = filters(&place);
    assert!(before.iter().all(Option::is_some), "{before:?}");
    let mut stream =
        within(&place.client, || TcpStream::connect_timeout(&SocketAddr::from((NODE, 30080)), SOON).unwrap());
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut ask = || {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    };
    ask();
    drop(first);
    ask();

    let second = place.start_by_filters().unwrap();
    let after = filters(&place);
    assert!(before.iter().zip(&after).all(|(before, after)| after.is_some() && before != after), "{after:?}");
    ask();
    // A device that is no edge any more is let go of, the others stay.
    within(&place.node, || {
        let index = Netlink::open().unwrap().link("up0").unwrap().index;
        second.programs.attach_edges(&[(index, "up0".to_owned())].into()).unwrap();
    });
    assert_eq!(filters(&place), [None, None, after[2], after[3]]);
    drop(second);
    drop(stream);
    echo.join().unwrap();

    within(&place.node, || programs::remove(&place.pins)).unwrap();
    assert_eq!(filters(&place), [None; 4]);
    within(&place.client, || ask_tcp(SocketAddr::from((NODE, 30080)))).unwrap_err();
    within(&place.node, || ask_tcp(vip(10))).unwrap_err();
}

#[test]
fn links_of_an_earlier_agent_are_taken_over() {
    if !require("dataplane::filters-take-over", &[NEEDS.as_slice(), &["tcx"]].concat()) {
        return;
    }
    let place = Place::new("fl").unwrap();
    let mut first = place.start().unwrap();
    first.service(10, 30080, &[serve(&place.pod, POD, "pod")]).unwrap();
    let ask = || within(&place.client, || ask_tcp(SocketAddr::from((NODE, 30080))));
    assert_eq!(filters(&place), [None; 4]);
    let links = hook_pins(&place.pins, "edge_");
    assert_eq!(links.len(), 4, "{links:?}");
    ask().unwrap();
    drop(first);

    let second = place.start_by_filters().unwrap();
    assert!(filters(&place).iter().all(Option::is_some));
    let pins = hook_pins(&place.pins, "edge_");
    assert!(links.is_disjoint(&pins) && pins.len() == links.len(), "{pins:?}");
    ask().unwrap();
    drop(second);
}

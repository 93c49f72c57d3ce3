//! Every target over its corpus and inputs made from it.

use weft_tests_fuzz::{Mutations, TARGETS, find};

/// Names the input that a target panics on, so that it can be kept.
struct Last<'a> {
    target: &'static str,
    bytes: &'a [u8],
}

impl Drop for Last<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path = std::env::temp_dir().join(format!("weft-fuzz-{}", self.target));
            match std::fs::write(&path, self.bytes) {
                Ok(()) => eprintln!("{} panicked on the input now in {}", self.target, path.display()),
                Err(error) => eprintln!("{} panicked on {:?} ({error})", self.target, self.bytes),
            }
        }
    }
}

fn replay(name: &str) {
    let target = find(name).expect("a target of that name");
    let seeds = target.seeds().expect("the corpus is read");
    assert!(!seeds.is_empty(), "{name} has no corpus");
    let made = Mutations::new(seeds.clone()).take(target.tries);
    for bytes in seeds.into_iter().chain(made) {
        let last = Last { target: target.name, bytes: &bytes };
        (target.run)(&bytes);
        drop(last);
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_test() {
            let tested = [$(stringify!($name)),*];
            let all: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(all, tested);
        }
    };
}

targets! {
    packet_bytes packet_built packet_answer policy_verdict policy_objects service_steps service_objects service_feed arp_frame ndp_message
    netlink_reply cni_config cni_call api_json api_yaml api_protobuf api_patch api_selector api_text api_request dns_query image_archive image_layer
    image_reference log_line
}

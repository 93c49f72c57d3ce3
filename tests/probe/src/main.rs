//! `weft-probe`: the program in the pods of the network tests. It serves, and says who asked; it asks, and says who answered.
#![forbid(unsafe_code)]

mod ask;
mod serve;

use std::io::Write as _;
use std::net::ToSocketAddrs as _;
use std::process::ExitCode;

const USAGE: &str = "usage: weft-probe serve PORT/tcp|udp[=NAME] …   answer on these ports, for ever
       weft-probe ask                          requests from standard input, outcomes to standard output
       weft-probe resolve NAME                 the addresses of a name, as the C library finds them";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["serve", ports @ ..] if !ports.is_empty() => serve::run(ports),
        ["ask"] => ask::run(),
        ["resolve", name] => resolve(name),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn resolve(name: &str) -> Result<(), String> {
    let found = (name, 0).to_socket_addrs().map_err(|error| format!("cannot resolve {name}: {error}"))?;
    let mut addresses: Vec<_> = found.map(|address| address.ip()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    for address in addresses {
        writeln!(std::io::stdout(), "{address}").map_err(|error| error.to_string())?;
    }
    Ok(())
}

//! `make manifests`: writes into `manifests/` what follows from other files.

use std::fs;

fn main() {
    for (path, text) in e2e::manifests::refreshed(e2e::source_dir()) {
        let name = path.display();
        if fs::read_to_string(&path).is_ok_and(|now| now == text) {
            continue;
        }
        fs::write(&path, text).unwrap_or_else(|error| panic!("writing {name}: {error}"));
        println!("{name}");
    }
}

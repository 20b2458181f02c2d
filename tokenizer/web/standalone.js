import { playground } from "./playground.js";

const root = document.getElementById("playground");
playground(root).catch((error) => root.replaceChildren(`The server does not respond: ${error.message}`));

export function startWatch(element) { return { show() {} }; }
